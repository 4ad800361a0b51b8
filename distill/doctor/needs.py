"""What a run will write and hold, estimated from its config and the files it names; nothing is loaded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from distill.config import RunConfig, SourceConfig
from distill.doctor.findings import size
from distill.models import resolve_model
from distill.plan.corpus import raw_count
from distill.plan.encoders import architecture_of
from distill.stages import source_files, trained_stages

SENTENCE_BYTES = 110  # of English text
STATE_BYTES = 12  # a parameter and Adam's two moments, in fp32
LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")


def disk_needed(config: RunConfig) -> tuple[int | None, str]:
    """Bytes that the run is still to write, None if that cannot be known; and what they are, in words."""
    parts = {"shards": _shard_bytes(config), "checkpoints and students": _training_bytes(config)}
    unknown = [name for name, value in parts.items() if value is None]
    if unknown:
        return None, f"not known ({', '.join(unknown)})"
    known = {name: value for name, value in parts.items() if value}
    total = sum(known.values())
    if len(known) < 2:
        return total, size(total)
    return total, f"{size(total)} ({', '.join(f'{name} {size(value)}' for name, value in known.items())})"


def _shard_bytes(config: RunConfig) -> int | None:
    if "precompute" not in config.stages or (config.shards_dir / "manifest.json").exists():
        return 0
    num, width = num_sentences(config), teacher_width(config)
    if num is None or width is None:
        return None
    return num * (2 * SENTENCE_BYTES + 2 * width)  # the text lies there once before it is embedded, and once in the shards


def num_sentences(config: RunConfig) -> int | None:
    """About how many sentences are embedded."""
    counts = [raw_count(source, SENTENCE_BYTES) for source in config.text.sources]
    most = None if None in counts else sum(count for count in counts if count is not None)
    limits = [number for number in (most, config.text.max_sentences) if number is not None]
    return min(limits) + config.text.held_out if limits else None


def files_of(config: RunConfig, source: SourceConfig) -> list[tuple[str, int]]:
    """The local files of one source, with their sizes in bytes."""
    text = config.text.model_copy(update={"sources": [source]})
    teacher = config.teacher.model_copy(update={"vectors": None})
    return source_files(config.model_copy(update={"text": text, "teacher": teacher}))


def teacher_width(config: RunConfig) -> int | None:
    """Dimensions of the teacher's vectors; None where they cannot be known here."""
    try:
        return sum(architecture_of(model.model or "", model.revision).dim for model in config.teacher.models)
    except ValueError:  # which another check names
        return None


def _training_bytes(config: RunConfig) -> int | None:
    stages = [stage for stage in trained_stages(config) if not (config.run_dir / stage / "DONE.json").exists()]
    parameters = num_parameters(config)
    if not stages:
        return 0
    if parameters is None:
        return None
    total = 0
    for stage in stages:
        there = sum(path.stat().st_size for path in (config.run_dir / stage).glob("checkpoints/*/*.safetensors"))
        checkpoints = (getattr(config, stage).keep + 1) * STATE_BYTES * parameters  # a new one is whole before an old one goes
        total += max(0, checkpoints - there) + 2 * 4 * parameters  # the stage's student, and its export
    return total


def num_parameters(config: RunConfig) -> int | None:
    """Of the student's encoder; None if it is not a folder here."""
    name = config.teacher.model if config.student.init == "teacher" else config.student.init
    folder = _folder(name)
    if folder is None:
        return None
    sizes: dict[int | None, int] = {}  # by layer
    for path in folder.rglob("*.safetensors"):
        for name, tensor in _tensors(path).items():
            found = LAYER.search(f".{name}")
            layer = int(found[1]) if found else None
            sizes[layer] = sizes.get(layer, 0) + math.prod(tensor["shape"])
    depth = len(sizes.keys() - {None})
    kept = config.student.kept(depth) if depth else []
    return sum(size for layer, size in sizes.items() if layer is None or layer in kept)


def _tensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: {name: {"shape": ...}}."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _folder(model: str | None) -> Path | None:
    """The folder of a model; None for a hub name and for what is no model, which another check names."""
    try:
        path = Path(resolve_model(model or ""))
    except ValueError:
        return None
    return path if path.is_dir() else None
