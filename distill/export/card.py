"""The model card of an exported student: what it is, what it was made from, how, and what it reaches."""

from __future__ import annotations

from typing import Any

from distill.config import RunConfig

NAMES = {"ckd": "contrastive knowledge distillation", "finetune": "contrastive fine-tuning", "hpd": "projective distillation"}


def model_card(config: RunConfig, stage: str, text: dict[str, Any] | None, results: dict[str, Any] | None) -> str:
    """README.md of runs/NAME/export/STAGE. text: the corpus manifest; results: of results.json."""
    teacher = config.teacher.model or config.teacher.vectors
    counts = (text or {}).get("counts", {})
    sources = ", ".join(source.name or source.path or source.type for source in config.text.sources)
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [sentence-transformers, knowledge-distillation]",
        "license: other",
        "---",
        f"# {config.name}, after {NAMES[stage]}",
        "",
        f"A student of `{teacher}`, trained by distill on {counts.get('kept', 0):,} sentences from {sources}.",
        "Its weights descend from its teacher's and its text's: their licences apply.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        'model = SentenceTransformer("this/folder")',
    ]
    if stage == "hpd" and config.hpd.nested:
        lines.append(f"small = SentenceTransformer('this/folder', truncate_dim={max(config.hpd.nested)})  # sizes are nested")
    lines += ['model.encode(["a sentence"])', "```", "", "## Data", ""]
    lines += [f"- {name.replace('_', ' ')}: {number:,}" for name, number in counts.items()]
    lines += ["", "## Recipe", "", "```yaml", *_yaml({stage: getattr(config, stage).model_dump(mode="json")}), "```", ""]
    if results is not None:
        lines += ["## Results", "", *_results(results), ""]
    return "\n".join(lines)


def _results(results: dict[str, Any]) -> list[str]:
    lines = [
        f"- parameters: {results['params']:,}",
        f"- dimensions: {results['dim']} ({results['bytes_per_vector']} bytes a vector)",
    ]
    fidelity = results.get("fidelity", {})
    held_out = f" ({fidelity['sentences']:,} held-out sentences)" if "sentences" in fidelity else ""
    lines += [
        f"- fidelity to the teacher, {name}: {value:.3f}{held_out}" for name, value in fidelity.items() if name != "sentences"
    ]
    lines += [f"- {name}: {value:.2f}" for name, value in results.get("sts", {}).items() if isinstance(value, float)]
    return lines


def _yaml(tree: dict[str, Any]) -> list[str]:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False).rstrip().splitlines()
