"""Estimates of the disk space that a run needs and of its student's parameters, from the config and the files it names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

from distill.config import RunConfig
from distill.plan.architectures import architecture_of
from distill.plan.text_estimate import raw_count
from distill.run.formatting import format_bytes
from distill.run.model_folders import resolve_model
from distill.student.initial import pooling_and_length, with_config
from distill.student.pooling import pooled_width
from distill.teacher.identity import initial_student

SENTENCE_BYTES = 110  # of English text
STATE_BYTES = 12  # of a parameter and Adam's two moments, in fp32
STUDENT_BYTES = 4  # of a parameter of the best student, in fp32
LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")


def disk_needed(config: RunConfig) -> tuple[int | None, str]:
    """Bytes that the run will still write, None if unknown; and what they are, in words."""
    parts = {"shards": _shard_bytes(config), "checkpoints and students": _training_bytes(config)}
    known = {name: value for name, value in parts.items() if value is not None}
    if len(known) < len(parts):
        return None, f"not known ({', '.join(parts.keys() - known.keys())})"
    total = sum(known.values())
    described = ", ".join(f"{name} {format_bytes(value)}" for name, value in known.items() if value)
    return total, f"{format_bytes(total)} ({described})"


def _shard_bytes(config: RunConfig) -> int | None:
    if "precompute" not in config.stages or (config.shards_dir / "manifest.json").exists():
        return 0
    num = num_sentences(config)
    try:
        width = sum(architecture_of(model.model or "", model.revision).dim for model in config.teacher.models)
    except ValueError:  # `inputs` names what is missing
        return None
    # the text is stored by itself before it is embedded, and again in the shards
    return num and num * (2 * SENTENCE_BYTES + 2 * width)


def num_sentences(config: RunConfig) -> int | None:
    """About how many sentences are embedded."""
    counts = [raw_count(source, SENTENCE_BYTES) for source in config.text.sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    limits = [limit for limit in (total, config.text.max_sentences) if limit is not None]
    return min(limits) + config.text.held_out if limits else None


def _training_bytes(config: RunConfig) -> int | None:
    stages = [stage for stage in config.training_stages if not (config.run_dir / stage / "DONE.json").exists()]
    parameters, total = num_parameters(config), 0
    if parameters is None:
        return None if stages else 0
    for stage in stages:
        written = sum(path.stat().st_size for path in (config.run_dir / stage).glob("checkpoints/**/*.safetensors"))
        # those kept beside the newest, the newest, and the next, which is complete before one goes; each with a student
        checkpoints = (config.train(stage).keep + 2) * (STATE_BYTES + STUDENT_BYTES) * parameters
        total += max(0, checkpoints - written) + 2 * STUDENT_BYTES * parameters  # the stage's student, and its export
        if getattr(config.train(stage), "freeze_encoder", False):
            width, num = student_width(config), num_sentences(config)
            if width is None or num is None:
                return None
            total += 2 * width * num  # its encoded texts, in float16
    return total


def student_width(config: RunConfig) -> int | None:
    """The width of the student's encoder with its pooling; None if the encoder is not known here."""
    section = config.student
    try:
        name = config.teacher.model if section.init == "teacher" else section.init
        section = initial_student(section, config.teacher)
        encoder = architecture_of(name or "", section.revision)
    except ValueError:  # `inputs` names what is missing
        return None
    pooling, _ = pooling_and_length(section, encoder.settings, encoder.max_length)
    depth = encoder.config.num_hidden_layers
    depth = len(section.kept(depth)) if section.layers is not None else depth
    return with_config(encoder.settings, section).width(pooled_width(pooling, encoder.config.hidden_size, depth))


def num_parameters(config: RunConfig) -> int | None:
    """Of the student's encoder, read off the headers of its safetensors files; None if it is not a folder here."""
    try:
        name = (config.teacher.model if config.student.init == "teacher" else config.student.init) or ""
        folder = Path(resolve_model(name))
        if not folder.is_dir():
            return None
        num_tokens = getattr(architecture_of(name, config.student.revision).config, "vocab_size", 0)
    except ValueError:  # `inputs` names what is missing
        return None
    # a student of `tokens`, or of all tokens that occur, is counted with the whole table
    num_kept = min(num_tokens, (config.student.vocabulary and config.student.vocabulary.size) or num_tokens)
    sizes: Counter[int | None] = Counter()  # by layer
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:  # safetensors' own reader would hold the GIL while a file system blocks it
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name in header.keys() - {"__metadata__"}:
            found, shape = LAYER.search(f".{name}"), header[name]["shape"]
            if found is None and len(shape) == 2 and shape[0] == num_tokens:
                shape = [num_kept, shape[1]]
            sizes[int(found[1]) if found else None] += math.prod(shape)
    depth = len(sizes.keys() - {None})
    return sum(sizes[layer] for layer in [None, *(config.student.kept(depth) if depth else [])])
