"""What the config names: there on each node, and the same there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill.config import ModelConfig, RunConfig, SourceConfig
from distill.doctor.findings import Facts, Finding, Findings, Nodes, odd_ones, size, warning
from distill.doctor.needs import files_of
from distill.doctor.start import Start
from distill.models import resolve_model

MOST_OPENED = 16


def look(start: Start) -> Facts:
    """errors: what is not there, by its key. sizes: bytes of what is. hub: models that are to be downloaded."""
    config = start.config
    errors: dict[str, str] = {}
    sizes: dict[str, int] = {}
    hub: dict[str, str] = {}
    for key, model in _models(config):
        try:
            found = resolve_model(model.model or "")
        except ValueError as error:
            errors[key] = str(error)
            continue
        if Path(found).is_dir():
            sizes[f"{key} {found}"] = sum(path.stat().st_size for path in Path(found).rglob("*.safetensors"))
        elif not _is_cached(found, model.revision):
            hub[key] = found
    for key, path in _paths(config):
        if not Path(path).exists():
            errors[key] = f"no {path}"
        elif Path(path).is_file():
            sizes[path] = Path(path).stat().st_size
    for number, source in enumerate(config.text.sources):
        files = files_of(config, source)
        try:
            _open(source, files)
        except (OSError, ValueError) as error:
            errors[f"text.sources[{number}]"] = str(error)
        sizes |= dict(files) if len(files) <= MOST_OPENED else {str(source.path): sum(length for _, length in files)}
    return {"errors": errors, "sizes": sizes, "hub": hub, "offline": _is_offline()}


def _models(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    if config.teacher.model is not None:
        yield "teacher.model", config.teacher
    for number, other in enumerate(config.teacher.concat):
        yield f"teacher.concat[{number}]", other
    if config.student.init != "teacher":
        yield "student.init", ModelConfig(model=config.student.init, revision=config.student.revision)


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.teacher.vectors is not None:
        yield "teacher.vectors", config.teacher.vectors
    if "finetune" in config.stages and config.finetune.triplets is not None:
        yield "finetune.triplets", config.finetune.triplets
    if "evaluate" in config.stages:
        folders = {"sts": [config.evaluate.sts], "retrieval": config.evaluate.retrieval, "transfer": config.evaluate.transfer}
        for key, named in folders.items():
            for folder in named or []:
                if folder is not None and not folder.startswith("hub"):
                    yield f"evaluate.{key}", folder


def _open(source: SourceConfig, files: list[tuple[str, int]]) -> None:
    """Raises ValueError or OSError for a source that cannot be read; of many files, opens the first and the last."""
    from distill.corpus.sources import check_source

    few = len(files) <= MOST_OPENED
    opened = [source] if few else [source.model_copy(update={"path": path}) for path, _ in (files[0], files[-1])]
    for each in opened:
        check_source(each)


def _is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def _is_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, facts in nodes.items():
        for key, error in facts["errors"].items():
            having = [other for other, found in nodes.items() if key not in found["errors"]]
            fix = (
                f"{having[0]} has it: put it on a file system that all nodes see, or copy it to {node}" if having else f"{key}="
            )
            yield Finding(node, f"{key}: {error}", fix if having else f"name one that is there: {fix}PATH")
        for key, name in facts["hub"].items():
            fix = f"hf download {name}, with HF_HOME on a disk that all nodes see"
            what = f"{key}: {name} is not in this node's cache"
            is_offline = facts["offline"]
            yield Finding(node, what, fix) if is_offline else warning(node, f"{what}, and would be downloaded", fix)
    for name in dict.fromkeys(name for facts in nodes.values() for name in facts["sizes"]):
        having_it = {node: facts for node, facts in nodes.items() if name in facts["sizes"]}
        for node, own, usual, where in odd_ones({node: facts["sizes"][name] for node, facts in having_it.items()}):
            what = f"{name} is not what it is on {where}: {own:,} bytes here, {usual:,} there"
            yield Finding(node, what, f"copy it from {where.partition(',')[0]}, or put it where all nodes see it")


def note(facts: Facts) -> str:
    return f"{len(facts['sizes'])} files and models, {size(sum(facts['sizes'].values()))}"
