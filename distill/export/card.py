"""The model card of an exported student: what it is, how to load it, what it was made from, and what it reaches.

YAML front matter for the hub, then Files, With sentence-transformers, With onnxruntime, Data, Recipe, Results.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.config import RunConfig
from distill.export.formats import FORMATS
from distill.export.results import results_table
from distill.stages import read_json

NAMES = {
    "ckd": "contrastive knowledge distillation",
    "simcse": "unsupervised contrastive learning",
    "finetune": "contrastive fine-tuning",
    "hpd": "projective distillation",
}
PURPOSES = {
    "model.safetensors": "the encoder's weights, float32",
    "tokenizer.json": "the tokenizer, which truncates and pads as in training",
    "onnx/model.onnx": "the whole model for onnxruntime, float32",
    "onnx/model_int8.onnx": "the same with weights in 8 bits",
    "export.json": "dimensions, longest input, and how near each format came to the trained student",
}

ONNX_SNIPPET = """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = "this/folder"
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{folder}/FILE", providers=["CPUExecutionProvider"])

batch = tokenizer.encode_batch(["a sentence", "another, somewhat longer sentence"])
tokens = {
    "input_ids": np.array([each.ids for each in batch], dtype=np.int64),
    "attention_mask": np.array([each.attention_mask for each in batch], dtype=np.int64),
}
vectors = session.run(None, tokens)[0]  # [2, DIM] float32, of length 1
cosines = vectors @ vectors.T"""


def model_card(
    config: RunConfig,
    stage: str,
    text: dict[str, Any] | None,
    results: dict[str, Any] | None,
    folder: Path | None = None,
    *,
    beside: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """README.md of runs/NAME/export/STAGE. text: the corpus manifest; results: this model's of results.json.

    folder: what the card describes, if not that directory of the run. beside: a whole results.json, from which the teacher and
    the nested sizes of this stage are shown too.
    """
    folder = folder or config.run_dir / "export" / stage
    about = read_json(folder / "export.json") or {}
    formats = [name for name in FORMATS if (folder / FORMATS[name].file).is_file()]
    nested = config.hpd.nested if stage == "hpd" else []
    parts = [
        _front(config, formats),
        _summary(config, stage, text, about, results),
        _files(folder, about),
        _sentence_transformers(nested),
        _onnxruntime(formats, about, nested),
        _data(text),
        f"## Recipe\n\n```yaml\n{_dump({stage: getattr(config, stage).model_dump(mode='json')})}```",
        results_table(stage, results, beside or {}) if results is not None else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(config: RunConfig, formats: list[str]) -> str:
    base = config.student.init if config.student.init != "teacher" else config.teacher.model
    onnx = ["onnx"] if {"onnx", "onnx-int8"} & set(formats) else []
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "knowledge-distillation", *onnx],
        "base_model": public(base or ""),
        "license": "other",
    }
    return f"---\n{_dump(front)}---"


def _summary(
    config: RunConfig, stage: str, text: dict[str, Any] | None, about: dict[str, Any], results: dict[str, Any] | None
) -> str:
    teachers = " and ".join(f"`{public(each.model or config.teacher.vectors or '')}`" for each in config.teacher.models)
    sources = ", ".join(public(source.name or source.path or source.type) for source in config.text.sources)
    kept = (text or {}).get("counts", {}).get("kept", 0)
    size = about or {"dim": (results or {}).get("dim"), "parameters": (results or {}).get("params")}
    figures = []
    if size.get("dim"):
        figures.append(f"- dimensions: {size['dim']}, L2-normalised; similarity function: cosine")
        figures.append(f"- parameters: {size['parameters']:,}")
    if size.get("max_length"):
        figures.append(f"- longest input: {size['max_length']} tokens; what is longer is truncated")
    return "\n".join(
        [
            f"# {config.name}, after {NAMES[stage]}",
            "",
            f"A student of {teachers}, trained by distill on {kept:,} sentences from {sources}.",
            "Its weights descend from its teacher's and its text's: their licences apply.",
            *(["", *figures] if figures else []),
        ]
    )


def _files(folder: Path, about: dict[str, Any]) -> str:
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes.pop("README.md", None)
    if not sizes:
        return ""
    rows = [f"| `{name}` | {_size(sizes[name])} | {purpose} |" for name, purpose in PURPOSES.items() if name in sizes]
    rest = sum(size for name, size in sizes.items() if name not in PURPOSES)
    rows.append(f"| the rest | {_size(rest)} | what sentence-transformers needs beside: modules, their weights and configs |")
    checked = [f"{name} {cosine['worst']:.5f} (mean {cosine['mean']:.5f})" for name, cosine in about.get("cosines", {}).items()]
    lines = [
        "## Files",
        "",
        "| file | size | what for |",
        "|---|---:|---|",
        *rows,
        "",
        f"On disk: {_size(sum(sizes.values()))}.",
    ]
    if checked:
        lines.append(
            f"Worst cosine to the student as it was trained, on {about['checked_on']:,} sentences: {', '.join(checked)}."
        )
    return "\n".join(lines)


def _sentence_transformers(nested: list[int]) -> str:
    lines = [
        "## With sentence-transformers",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("this/folder")',
        'vectors = model.encode(["a sentence", "another, somewhat longer sentence"])',
        "cosines = model.similarity(vectors, vectors)",
        "```",
        "",
        "No prompt is put before a sentence, neither before queries nor before documents.",
    ]
    if nested:
        lines += [
            "",
            f"Sizes are nested: the first {' or '.join(map(str, nested))} dimensions of a vector are a vector of that size.",
            "",
            "```python",
            f'small = SentenceTransformer("this/folder", truncate_dim={max(nested)})',
            'vectors = small.encode(["a sentence"], normalize_embeddings=True)  # else a prefix is shorter than 1',
            "```",
        ]
    return "\n".join(lines)


def _onnxruntime(formats: list[str], about: dict[str, Any], nested: list[int]) -> str:
    graphs = [name for name in ("onnx", "onnx-int8") if name in formats]
    if not graphs:
        return ""
    code = ONNX_SNIPPET.replace("FILE", FORMATS[graphs[0]].file).replace("DIM", str(about.get("dim", "dim")))
    lines = [
        "## With onnxruntime",
        "",
        "Pooling, head and normalisation are inside the graph: `pip install onnxruntime tokenizers numpy` is all it needs.",
        "",
        f"```python\n{code}\n```",
    ]
    if nested:
        lines += ["", "A prefix of a vector is to be divided by its own length."]
    if "onnx-int8" in graphs:
        operator = "`MatMulNBits` operator (8 bits, blocks of 32), which onnxruntime has on CPUs from 1.22 on"
        lines += ["", f"`{FORMATS['onnx-int8'].file}` needs onnxruntime's own {operator}; the float32 graph is plain ONNX."]
    lines += ["", '`backend="onnx"` of sentence-transformers expects a graph without pooling: this is not one.']
    return "\n".join(lines)


def _data(text: dict[str, Any] | None) -> str:
    counts = (text or {}).get("counts", {})
    return "\n".join(["## Data", "", *(f"- {name.replace('_', ' ')}: {number:,}" for name, number in counts.items())])


def public(name: str) -> str:
    """A name as it may be published: of an absolute path its last part, of package:NAME/FOLDER the package."""
    if name.startswith("package:"):
        return name.removeprefix("package:").partition("/")[0]
    return Path(name).name if name.startswith(("/", "~")) else name


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:,.1f} kB"


def _dump(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
