"""The models, texts and evaluation sets that the config names: on every node, as the run needs them, and the same there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from distill.config import RunConfig
from distill.corpus.sources import matching_files
from distill.doctor.check import Context, Facts, Finding, Findings, Nodes, outliers, warning
from distill.doctor.preflight import MAX_OPENED, problems
from distill.run.formatting import format_bytes
from distill.run.model_folders import resolve_model
from distill.teacher.imported import vector_files
from distill.teacher.teacher_config import ModelConfig


def collect(context: Context) -> Facts:
    """errors: what is not there or does not fit, by its key. sizes: bytes of what is. hub: models that would be downloaded."""
    config = context.config
    errors: dict[str, str] = {}
    for problem in problems(config):
        errors[problem.key] = "; ".join(filter(None, (errors.get(problem.key), problem.what)))
    sizes: dict[str, int] = {}
    hub: dict[str, str] = {}
    for key, model in _models(config):
        try:
            place = resolve_model(model.model or "")
        except ValueError:  # one of the problems
            continue
        if Path(place).is_dir():
            sizes[f"{key} {place}"] = sum(path.stat().st_size for path in Path(place).rglob("*.safetensors"))
        elif key not in errors and not isinstance(try_to_load_from_cache(place, "config.json", revision=model.revision), str):
            hub[key] = place
    found = {path: Path(path).stat().st_size for path in vector_files(config.teacher) if Path(path).is_file()}
    sizes |= found if len(found) <= MAX_OPENED else {", ".join(config.teacher.vector_paths): sum(found.values())}
    triplets = getattr(config.train("finetune"), "triplets", None)
    if "finetune" in config.stages and triplets is not None and Path(triplets).is_file():
        sizes[triplets] = Path(triplets).stat().st_size
    for source in config.text.sources:
        with suppress(ValueError):
            found = {
                str(path): path.stat().st_size for path in (matching_files(source) if source.type != "huggingface" else [])
            }
            sizes |= found if len(found) <= MAX_OPENED else {str(source.path): sum(found.values())}
    summary = f"{len(sizes)} files and models, {format_bytes(sum(sizes.values()))}"
    return {"errors": errors, "sizes": sizes, "hub": hub, "offline": bool(constants.HF_HUB_OFFLINE), "summary": summary}


def _models(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    for number, model in enumerate(config.teacher.models):
        if number or model.model is not None:
            yield f"teacher.concat[{number - 1}]" if number else "teacher.model", model
    if config.student.init != "teacher":
        yield "student.init", ModelConfig(model=config.student.init, revision=config.student.revision)


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        for key, error in facts["errors"].items():
            having = next((other for other, found in nodes.items() if key not in found["errors"]), None)
            fix = f"change {key}, or what it names, as this says"
            if having:
                fix = f"{having} has it: put it on a file system that all nodes see, or copy it to {node}"
            yield Finding(node, f"{key}: {error}", fix)
        for key, name in facts["hub"].items():
            what = f"{key}: {name} is not in this node's cache"
            fix = f"hf download {name}, with HF_HOME on a disk that all nodes see"
            yield Finding(node, what, fix) if facts["offline"] else warning(node, f"{what}, and would be downloaded", fix)
    for name in dict.fromkeys(name for facts in nodes.values() for name in facts["sizes"]):
        for node, here, usual, where in outliers(nodes, "sizes", name):
            fix = f"copy it from {where.partition(',')[0]}, or put it where all nodes see it"
            yield Finding(node, f"{name} is not the same as on {where}: {here:,} bytes here, {usual:,} there", fix)
