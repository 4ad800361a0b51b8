"""The model card of an exported student: what it is, how to load it and what it was made from.

YAML front matter for the hub, then Files, With sentence-transformers, With onnxruntime, With other clients, Data, Recipe. The
report stage adds Results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill.export.formats import FORMATS
from distill.run.files import read_json
from distill.run.formatting import format_bytes, format_markdown_table

PURPOSES = {
    "model.safetensors": "the encoder's weights, float32",
    "tokenizer.json": "the tokenizer, which truncates and pads as in training",
    "onnx/model.onnx": "the whole model for onnxruntime, float32",
    "onnx/model_quantized.onnx": "the same with weights in 8 bits",
    "export.json": "dimensions, longest input, and the cosines of each format to the trained student",
}

SENTENCE_TRANSFORMERS_SNIPPET = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this/folder")
vectors = model.encode(["a text", "another, somewhat longer text"])
cosines = model.similarity(vectors, vectors)"""

PROMPTS_SNIPPET = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this/folder")
queries = model.encode_query(["a question"])
documents = model.encode_document(["a text", "another, somewhat longer text"])
cosines = model.similarity(queries, documents)"""

ONNX_SNIPPET = """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = "this/folder"
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{folder}/FILE", providers=["CPUExecutionProvider"])

batch = tokenizer.encode_batch(["a text", "another, somewhat longer text"])
tokens = {
    "input_ids": np.array([each.ids for each in batch], dtype=np.int64),
    "attention_mask": np.array([each.attention_mask for each in batch], dtype=np.int64),
}
vectors = session.run(None, tokens)[0]  # [2, DIM] float32, of length 1
cosines = vectors @ vectors.T"""


@dataclass(frozen=True)
class Provenance:
    """What an exported student was made from.

    method: the title of the task; base_model: the model that it was initialised from; recipe: the settings of its stage; text:
    the manifest of the training text, or None; earlier: the settings of the stages before it, from the first on, by name;
    samples: the training samples of these stages, a text once in every epoch; language: ISO 639 codes;
    is_asymmetric: whether the folder encodes queries alone, in the teacher's space.
    """

    run: str
    stage: str
    method: str
    base_model: str
    teachers: list[str]
    sources: list[str]
    recipe: dict[str, Any]
    nested: list[int]
    text: dict[str, Any] | None
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    language: list[str] | None = None
    is_asymmetric: bool = False


def model_card(folder: Path, provenance: Provenance, model_index: Sequence[Mapping[str, Any]] = ()) -> str:
    """README.md of the exported `folder`, from its files and where they come from.

    model_index: the measured results, in the hub's format.
    """
    about = read_json(folder / "export.json") or {}
    prompts = _prompts(folder)
    formats = [name for name in FORMATS if (folder / FORMATS[name].file).is_file()]
    parts = [
        _front(provenance, formats, model_index),
        _summary(provenance, about),
        _files(folder, about),
        _sentence_transformers(provenance.nested, prompts),
        _onnxruntime(formats, about, provenance.nested, prompts),
        _other_clients(provenance, formats),
        _data(provenance.text),
        f"## Recipe\n\n```yaml\n{_dump(without_paths({**provenance.earlier, provenance.stage: provenance.recipe}))}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(provenance: Provenance, formats: list[str], model_index: Sequence[Mapping[str, Any]]) -> str:
    onnx = ["onnx"] if {"onnx", "onnx-int8"} & set(formats) else []
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "knowledge-distillation", *onnx],
        **({"base_model": provenance.base_model} if is_hub_id(provenance.base_model) else {}),
        **({"language": provenance.language} if provenance.language else {}),
        "license": "other",
        **({"model-index": list(model_index)} if model_index else {}),
    }
    return f"---\n{_dump(front)}---"


def _summary(provenance: Provenance, about: dict[str, Any]) -> str:
    teachers = " and ".join(f"`{public(name)}`" for name in provenance.teachers)
    sources = ", ".join(escaped(public(source)) for source in provenance.sources)
    kept = (provenance.text or {}).get("counts", {}).get("kept", 0)
    names = [*provenance.earlier, provenance.stage]
    counts = {name: f" ({provenance.samples[name]:,} samples)" if provenance.samples.get(name) else "" for name in names}
    stages = ", then ".join(f"`{name}`{count}" for name, count in counts.items())
    summary = f"""\
# {provenance.run}, after {provenance.method}

A student of {teachers}, trained by distill on {kept:,} texts from {sources}.
Stages: {stages}; their settings and further data are under Recipe.
Its weights descend from its teacher's and its text's: their licences apply."""
    if provenance.is_asymmetric:
        summary += (
            f"\n\nFor queries alone: its vectors lie in the space of {teachers}, which embeds the documents. Search with it"
            " what the teacher has embedded."
        )
    if not about:
        return summary
    return f"""\
{summary}

- dimensions: {about["dim"]}, L2-normalised; similarity function: cosine
- parameters: {about["parameters"]:,}
- longest input: {about["max_length"]} tokens; longer texts are truncated"""


def _files(folder: Path, about: dict[str, Any]) -> str:
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes.pop("README.md", None)
    if not sizes:
        return ""
    rows = [[f"`{name}`", purpose, format_bytes(sizes[name])] for name, purpose in PURPOSES.items() if name in sizes]
    rest = sum(size for name, size in sizes.items() if name not in PURPOSES)
    rows.append(["the rest", "modules, their weights and configs", format_bytes(rest)])
    checked = [f"{name} {cosine['worst']:.5f} (mean {cosine['mean']:.5f})" for name, cosine in about.get("cosines", {}).items()]
    lines = [
        "## Files",
        "",
        format_markdown_table(["file", "content", "size"], rows),
        "",
        f"On disk: {format_bytes(sum(sizes.values()))}.",
    ]
    if checked:
        lines.append(f"Lowest cosine to the student as it was trained, on {about['checked_on']:,} texts: {', '.join(checked)}.")
    return "\n".join(lines)


def _prompts(folder: Path) -> dict[str, str]:
    """What sentence-transformers' encode_query, encode_document and encode put before a text of the exported folder, as JSON
    strings, in which no character ends a line of Markdown; {} if all of them are empty."""
    path = folder / "config_sentence_transformers.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    prompts = about.get("prompts", {})
    found = {"encode_query": prompts.get("query"), "encode_document": prompts.get("document")}
    found["encode"] = prompts.get(about.get("default_prompt_name"))
    shown = {name: json.dumps(text or "", ensure_ascii=False).replace("`", "\\u0060") for name, text in found.items()}
    return shown if any(found.values()) else {}


def _sentence_transformers(nested: list[int], prompts: dict[str, str]) -> str:
    if prompts:
        snippet = PROMPTS_SNIPPET
        put = "\n".join(f"- `{name}` puts `{text}` before a text." for name, text in prompts.items())
        needs = f"It was trained with prompts, which other libraries may leave to you:\n\n{put}"
    else:
        snippet = SENTENCE_TRANSFORMERS_SNIPPET
        needs = "It needs no prompts, neither for queries nor for documents."
    section = f"""\
## With sentence-transformers

```python
{snippet}
```

{needs}"""
    if not nested:
        return section
    return f"""\
{section}

Sizes are nested: the first {" or ".join(map(str, nested))} dimensions of a vector are a vector of that size.

```python
small = SentenceTransformer("this/folder", truncate_dim={max(nested)})
vectors = small.encode(["a text"], normalize_embeddings=True)  # a prefix is shorter than 1
```"""


def _onnxruntime(formats: list[str], about: dict[str, Any], nested: list[int], prompts: dict[str, str]) -> str:
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
    if prompts:
        lines += ["", "Put the prompt, as above, before each text."]
    if nested:
        lines += ["", "Normalise a prefix of a vector again."]
    if "onnx-int8" in graphs:
        operator = "`MatMulNBits` (8 bits, blocks of 32), an operator of onnxruntime 1.22 and later on CPUs"
        lines += ["", f"`{FORMATS['onnx-int8'].file}` needs {operator}; the float32 graph is plain ONNX."]
    return "\n".join(lines)


def _other_clients(provenance: Provenance, formats: list[str]) -> str:
    """Which output to take, and what a client leaves out without a message."""
    lines = [
        "## With other clients",
        "",
        "- mteb stores results by a model's name, which a local folder does not have: measure it with distill's"
        " `launcher/evaluate.py --mteb`, or set"
        f" `model.model_card_data.model_name = {json.dumps(f'{provenance.run}/{provenance.stage}')}` first.",
        "- llama.cpp and txtai pool the tokens alone: they leave out Dense modules, and give other vectors then.",
        '- `quantize_embeddings(..., precision="int8")` of sentence-transformers gives affine codes, with an offset for each'
        " dimension. Stores that multiply the codes themselves need symmetric ones, or float32 vectors, which they quantise.",
    ]
    if {"onnx", "onnx-int8"} & set(formats):
        lines += [
            "- transformers.js: take `sentence_embedding` of `AutoModel`; `pipeline` pools `last_hidden_state` and omits the"
            " head. fastembed: `PoolingType.DISABLED` and `normalization=False`.",
            '- `backend="onnx"` of sentence-transformers pools `last_hidden_state` with the modules of the folder: it needs a'
            " pooling of the last layer alone.",
        ]
    return "\n".join(lines)


def _data(text: dict[str, Any] | None) -> str:
    counts = (text or {}).get("counts", {})
    return "\n".join(["## Data", "", *(f"- {name.replace('_', ' ')}: {number:,}" for name, number in counts.items())])


def public(name: str) -> str:
    """A name as it may be published: of an absolute path its last part, of package:NAME/FOLDER the package."""
    if name.startswith("package:"):
        return name.removeprefix("package:").partition("/")[0]
    return Path(name).name if name.startswith(("/", "~")) else name


def is_hub_id(name: str) -> bool:
    """Whether a name is owner/name on the hub: the only base_model that the hub takes."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~-])", r"\\\1", " ".join(text.split()))


def without_paths(value: Any) -> Any:
    """Settings as they may be published: of an absolute path its last part."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    return public(value) if isinstance(value, str) else value


def _dump(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
