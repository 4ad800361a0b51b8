"""Which models a study measures: the teacher, each student before it was trained, and what every stage made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distill.config import RunConfig
from distill.evaluation.encode import Encode, encoder_of
from distill.precision import autocast_dtype
from distill.sessions import read_sessions
from distill.shards import ShardReader, fingerprint
from distill.shards.moments import Moments
from distill.stages import fingerprint_of, read_json, trained_stages
from distill.teacher.encoder import Teacher
from distill.training.stage import build_student


class Loaded(NamedTuple):
    """encode: sentences to float32 [n, d]. params: of the whole model. timed: whether its speed is worth measuring."""

    encode: Encode
    params: int
    timed: bool = True


class Model(NamedTuple):
    """What gives rows of the table.

    name    of its row; a smaller size is NAME-64, a size by PCA NAME-pca-64
    origin  the row that it was made from, if any
    of      what changes when it does
    nested  sizes below its own, by truncation
    pca     sizes below its own, by the PCA of its vectors
    moments those that its PCA follows from, where they are known
    minutes its training took
    """

    name: str
    origin: str | None
    of: str
    load: Callable[[], Loaded]
    nested: Sequence[int] = ()
    pca: Sequence[int] = ()
    moments: Callable[[], Moments] | None = None
    minutes: float | None = None


def models_of(configs: Sequence[RunConfig], device: torch.device) -> Iterator[Model]:
    """All models, in the table's order; those of runs that have not been exported yet are left out."""
    first = configs[0]
    sizes = sorted({size for config in configs if "hpd" in config.stages for size in _sizes(config)}, reverse=True)
    shards = ShardReader(first.shards_dir, verify=False)
    of = fingerprint({"teacher": shards.manifest.teacher})
    yield Model("teacher", None, of, lambda: _teacher(first, device), pca=sizes, moments=lambda: shards.moments)
    untrained: dict[str, str] = {}
    for config in configs:
        encoder = config.student.model_dump(mode="json", exclude={"freeze_embeddings"})
        start = fingerprint({"student": encoder, "seed": config.seed, "teacher": of})
        if start not in untrained:
            name = _name_of_start(config)
            untrained[start] = f"{name}-{config.name}" if name in untrained.values() else name
            yield Model(untrained[start], None, start, lambda config=config: _untrained(config, device))  # type: ignore[misc]
        if not fingerprint_of(config.run_dir / "export"):
            continue
        for stage in trained_stages(config):
            init = None if stage == "ckd" else getattr(config, stage).init
            done = read_json(config.run_dir / stage / "DONE.json") or {}
            compressed = "hpd" in config.stages and config.hpd.init == stage
            yield Model(
                name_of(config, stage),
                untrained[start] if init in (None, "student") else name_of(config, init),
                fingerprint_of(config.run_dir / stage),
                lambda folder=config.run_dir / "export" / stage: _exported(str(folder), device),  # type: ignore[misc]
                nested=_sizes(config)[1:] if stage == "hpd" else (),
                pca=_sizes(config) if compressed else (),
                minutes=(done["results"]["seconds"] + _seconds_encoding(config.run_dir / stage)) / 60,
            )


def name_of(config: RunConfig, stage: str) -> str:
    """The row of a stage: that of CKD is called as its config."""
    return config.name if stage == "ckd" else f"{config.name}-{stage}"


def _name_of_start(config: RunConfig) -> str:
    """untrained-minilm-l6, untrained-mpnet-base-0-5-11, untrained-mpnet-base-6 for six layers, evenly spread"""
    student = config.student
    layers = [student.layers] if isinstance(student.layers, int) else student.layers or []
    encoder = Path(student.init if student.init != "teacher" else str(config.teacher.model)).name
    return "-".join(["untrained", encoder, *map(str, layers)])


def _seconds_encoding(stage: Path) -> float:
    """Of a frozen encoder, before its head was trained."""
    return sum(line["seconds"] for line in read_sessions(stage) if line["work"] == "encode")


def _sizes(config: RunConfig) -> list[int]:
    return sorted({config.hpd.dim, *config.hpd.nested}, reverse=True)


def _teacher(config: RunConfig, device: torch.device) -> Loaded:
    teacher = Teacher(config.teacher, device, autocast_dtype(config.teacher.precision, device))
    return Loaded(teacher, teacher.params)


def _exported(folder: str, device: torch.device) -> Loaded:
    encoder = encoder_of(folder, device=str(device))
    return Loaded(encoder, encoder.params)


def _untrained(config: RunConfig, device: torch.device) -> Loaded:
    student = build_student(config, "ckd").to(device).eval()

    def encode(sentences: list[str]) -> np.ndarray:
        return student.encode(sentences)

    return Loaded(encode, sum(parameter.numel() for parameter in student.parameters()), timed=False)
