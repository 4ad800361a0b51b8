"""The models, texts and evaluation sets that the config names: on every node, and the same there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from distill.config import RunConfig
from distill.corpus.sources import check_source, matching_files
from distill.doctor.check import Context, Facts, Finding, Findings, Nodes, outliers, warning
from distill.run.formatting import format_bytes
from distill.run.model_folders import resolve_model
from distill.teacher.teacher_config import ModelConfig

MAX_OPENED = 16  # files of one source; of more, the first and the last are opened


def collect(context: Context) -> Facts:
    """errors: what is not there, by its key. sizes: bytes of what is. hub: models that would be downloaded."""
    config = context.config
    errors: dict[str, str] = {}
    sizes: dict[str, int] = {}
    hub: dict[str, str] = {}
    for key, model in _models(config):
        try:
            place = resolve_model(model.model or "")
        except ValueError as error:
            errors[key] = str(error)
            continue
        if Path(place).is_dir():
            sizes[f"{key} {place}"] = sum(path.stat().st_size for path in Path(place).rglob("*.safetensors"))
        elif not isinstance(try_to_load_from_cache(place, "config.json", revision=model.revision), str):
            hub[key] = place
    for key, path in _paths(config):
        if not Path(path).exists():
            errors[key] = f"no {path}"
        elif Path(path).is_file():
            sizes[path] = Path(path).stat().st_size
    for number, source in enumerate(config.text.sources):
        try:
            files = matching_files(source) if source.type == "file" else []
            found = {str(path): path.stat().st_size for path in files}
            sizes |= found if len(files) <= MAX_OPENED else {str(source.path): sum(found.values())}
            opened = [source.path] if len(files) <= MAX_OPENED else [str(files[0]), str(files[-1])]
            for pattern in opened:
                check_source(source.model_copy(update={"path": pattern}))
        except (OSError, ValueError) as error:
            errors[f"text.sources[{number}]"] = str(error)
    summary = f"{len(sizes)} files and models, {format_bytes(sum(sizes.values()))}"
    return {"errors": errors, "sizes": sizes, "hub": hub, "offline": bool(constants.HF_HUB_OFFLINE), "summary": summary}


def _models(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    for number, model in enumerate(config.teacher.models):
        if number or model.model is not None:
            yield f"teacher.concat[{number - 1}]" if number else "teacher.model", model
    if config.student.init != "teacher":
        yield "student.init", ModelConfig(model=config.student.init, revision=config.student.revision)


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.teacher.vectors is not None:
        yield "teacher.vectors", config.teacher.vectors
    triplets = getattr(config.train("finetune"), "triplets", None)
    if "finetune" in config.stages and triplets is not None:
        yield "finetune.triplets", triplets
    sets = {"sts": [config.evaluate.sts], "retrieval": config.evaluate.retrieval, "transfer": config.evaluate.transfer}
    for key, folders in sets.items() if "evaluate" in config.stages else ():
        for folder in folders or []:
            if folder is not None and not folder.startswith("hub"):
                yield f"evaluate.{key}", folder


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        for key, error in facts["errors"].items():
            having = next((other for other, found in nodes.items() if key not in found["errors"]), None)
            fix = f"name one that exists: {key}=PATH"
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
