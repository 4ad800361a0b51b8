"""A run's plan: corpus, teacher, and for each stage memory, wire and time; and what to set, with the reason."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill.config import TRAINING_STAGES, FinetuneConfig, RunConfig, TrainConfig
from distill.corpus import read_rows
from distill.plan.corpus import Corpus
from distill.plan.encoders import Architecture, architecture_of
from distill.plan.memory import HALF, Memory, rank_memory
from distill.plan.shapes import Chunks, Growth, TaskShape, TeacherShape, task_shape, teacher_shape
from distill.plan.time import Cluster, StepTime, step_time, teacher_seconds
from distill.plan.wire import Sent, sent_in_a_step
from distill.sampling import CHUNK_ROWS, CHUNK_ROWS_ON_GPU, deal, dealt_order
from distill.student.student import PAD_TO
from distill.training.zero import find_deepspeed_config

VARIANTS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
LARGEST_MICRO = 1 << 14
WORTH_CHANGING = 0.9  # of a step's time: what is planned is no nearer to the truth
WORTH_CHECKPOINTING = 32  # rows: with fewer in a micro-batch, matrices are too thin to keep a device busy


@dataclass(frozen=True)
class Models:
    """What the config names, without weights. teachers: none where vectors are given. dim: of their vectors, side by side."""

    teachers: list[Architecture]
    student: Architecture
    dim: int


@dataclass(frozen=True)
class Variant:
    """One way to lay a stage out. fits: the most rows of a micro-batch whose tensors fit; 0: not even one."""

    name: str
    memory: Memory
    sent: list[Sent]
    fits: int
    step: StepTime


@dataclass(frozen=True)
class StagePlan:
    """once_seconds and once_bytes: of a frozen encoder's pass over the text and its vectors on disk; in `seconds` too."""

    name: str
    shape: TaskShape
    steps: int
    step: StepTime
    seconds: float
    dollars: float
    chosen: Variant
    variants: list[Variant]
    once_seconds: float
    once_bytes: float


@dataclass(frozen=True)
class Plan:
    """All figures of a run. `seconds` and `dollars` are of precompute and training together."""

    config: RunConfig
    cluster: Cluster
    corpus: Corpus
    models: Models
    shard_bytes: dict[str, float]
    teacher: TeacherShape | None
    teacher_operations: float
    teacher_seconds: float
    stages: list[StagePlan]
    advice: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.teacher_seconds + sum(stage.seconds for stage in self.stages)

    @property
    def dollars(self) -> float:
        return self.cluster.dollars(self.seconds)


def models_of(config: RunConfig) -> Models:
    """Raises ValueError where a shape is not known here."""
    teacher = config.teacher
    encoders = [architecture_of(each.model or "", each.revision) for each in teacher.models] if teacher.model else []
    if encoders:
        dim = sum(encoder.dim for encoder in encoders)
    else:
        from distill.teacher.imported import ImportedVectors

        dim = ImportedVectors(teacher).dim
    init = config.student.init
    student = encoders[0] if init == "teacher" else architecture_of(init, config.student.revision)
    return Models(encoders, student, dim)


def make_plan(config: RunConfig, cluster: Cluster, corpus: Corpus, models: Models) -> Plan:
    """Everything of a run but calibration. Raises ValueError for what cannot be run so."""
    teacher, operations, seconds = None, 0.0, 0.0
    if models.teachers:
        teacher, operations, seconds = _teacher(config, cluster, corpus, models.teachers)
    stages = [_stage(config, name, cluster, corpus, models) for name in config.stages if name in TRAINING_STAGES]
    shard_bytes = corpus.shard_bytes(models.dim, config.shards.rows, config.shards.block_rows)
    plan = Plan(config, cluster, corpus, models, shard_bytes, teacher, operations, seconds, stages)
    return replace(plan, advice=_advice(plan))


def _teacher(
    config: RunConfig, cluster: Cluster, corpus: Corpus, teachers: list[Architecture]
) -> tuple[TeacherShape, float, float]:
    total: TeacherShape | None = None
    operations = seconds = 0.0
    for each, architecture in zip(config.teacher.models, teachers, strict=True):
        shape = teacher_shape(architecture, is_bf16=cluster.is_bf16)
        lengths = np.minimum(corpus.lengths, each.max_length or 512).tolist()
        more = teacher_seconds(shape.flops, lengths, corpus.sentences + corpus.held_out, cluster)
        operations, seconds = operations + more[0], seconds + more[1]
        total = shape if total is None else replace(total, numel=total.numel + shape.numel, bytes=total.bytes + shape.bytes)
    assert total is not None
    return total, operations, seconds


def deal_batch(corpus: Corpus, train: TrainConfig, ranks: int, chunk_rows: int = CHUNK_ROWS) -> list[list[tuple[int, float]]]:
    """The chunks (rows, padded tokens) of each of rank 0's micro-batches of a typical global batch."""
    count = train.global_batch
    places = (np.arange(count) + 0.5) * len(corpus.lengths) / count
    lengths = corpus.lengths[places.astype(np.int64)]
    lengths = lengths[dealt_order(lengths)]
    parts = deal(lengths, rank=0, world_size=ranks, micro_batch=train.micro_batch, chunk_rows=chunk_rows)
    return [[(len(c), float(-(-lengths[c].max() // PAD_TO) * PAD_TO)) for c in chunks if len(c)] for chunks in parts]


def read_zero(path: Path) -> dict[str, Any]:
    """The section zero_optimization of a DeepSpeed configuration."""
    return json.loads(find_deepspeed_config(path).read_text(encoding="utf-8")).get("zero_optimization", {})


def _stage(config: RunConfig, name: str, cluster: Cluster, corpus: Corpus, models: Models) -> StagePlan:
    train: TrainConfig = getattr(config, name)
    if train.global_batch < cluster.ranks:
        raise ValueError(
            f"{name}.global_batch {train.global_batch} is smaller than {cluster.ranks} ranks: raise it, or plan fewer devices"
        )
    on_cpu = cluster.name == "cpu"
    shape = task_shape(config, name, models.student, models.dim, is_bf16=cluster.is_bf16, on_cpu=on_cpu)
    own = config.engine.deepspeed
    paths = {path.stem: path for path in (own, *(Path("configs/deepspeed") / f"{each}.json" for each in VARIANTS))}
    variants = [
        _variant(config, train, shape, cluster, corpus, label, read_zero(path)) for label, path in sorted(paths.items())
    ]
    chosen = next(variant for variant in variants if variant.name == own.stem)
    steps = num_steps(train, _rows(train, corpus))
    evaluations = steps // train.dev_every + 1
    evaluated = evaluations * config.evaluate.dev_sentences
    once_seconds = _pass_seconds(shape.once, corpus.sentences, cluster, corpus)
    once_bytes = float(HALF * shape.once_width * corpus.sentences)
    seconds = steps * chosen.step.total + once_seconds
    seconds += sum(_pass_seconds(flops, evaluated, cluster, corpus) for flops in (shape.flops, shape.once))
    dollars = cluster.dollars(seconds)
    return StagePlan(name, shape, steps, chosen.step, seconds, dollars, chosen, variants, once_seconds, once_bytes)


def _variant(
    config: RunConfig,
    train: TrainConfig,
    shape: TaskShape,
    cluster: Cluster,
    corpus: Corpus,
    label: str,
    zero: dict[str, Any],
) -> Variant:
    ranks, checkpointing = cluster.ranks, config.engine.activation_checkpointing
    micro = deal_batch(corpus, train, ranks, CHUNK_ROWS if cluster.name == "cpu" else CHUNK_ROWS_ON_GPU)
    sent = sent_in_a_step(shape, train, zero, ranks, len(micro))
    rows = sum(b for b, _ in micro[0])
    longest = [(rows * shape.encoded, float(config.student.max_length))]
    memory = rank_memory(shape, train, zero, ranks, longest, checkpointing=checkpointing)
    fits = largest_micro_batch(config, train, shape, zero, cluster)
    step = step_time(shape, train, zero, cluster, sent, micro, checkpointing=checkpointing)
    return Variant(label, memory, sent, fits, step)


def largest_micro_batch(config: RunConfig, train: TrainConfig, shape: TaskShape, zero: dict[str, Any], cluster: Cluster) -> int:
    """The most rows of a micro-batch that fit if each is as long as any may be; at most a rank's share of the global batch."""

    def needs(rows: int) -> float:
        chunks: Chunks = [(rows * shape.encoded, float(config.student.max_length))]
        checkpointing = config.engine.activation_checkpointing
        return rank_memory(shape, train, zero, cluster.ranks, chunks, checkpointing=checkpointing).device

    room = cluster.device.memory * cluster.assumed.usable
    low, high = 0, min(-(-train.global_batch // cluster.ranks), LARGEST_MICRO) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= room else (low, middle)
    return low


def num_steps(train: TrainConfig, rows: int) -> int:
    """As the loop counts them. Raises ValueError if the rows do not fill one global batch."""
    if rows < train.global_batch:
        raise ValueError(f"{rows:,} rows do not fill one global batch of {train.global_batch:,}: add text, or lower it")
    steps = math.ceil(train.epochs * (rows // train.global_batch))
    return min(steps, train.max_steps or steps)


def _rows(train: TrainConfig, corpus: Corpus) -> int:
    if not isinstance(train, FinetuneConfig):
        return corpus.sentences
    if train.triplets:
        return sum(1 for _ in islice(read_rows(train.triplets, train.fields), train.limit))
    if train.dataset is None:
        return min(train.num_mined, corpus.sentences)
    if train.limit is None:
        raise ValueError(f"how many triplets {train.dataset} has is not known here: give finetune.limit=N")
    return train.limit


def _pass_seconds(flops: Growth, sentences: int, cluster: Cluster, corpus: Corpus) -> float:
    """Of a forward pass of so many sentences, on all ranks."""
    device = cluster.device
    return flops([(sentences, corpus.tokens)]) / cluster.ranks / (device.peak(cluster.is_bf16) * device.student)


def _advice(plan: Plan) -> list[str]:
    """What to set, each with its reason."""
    room = plan.cluster.device.memory * plan.cluster.assumed.usable
    found = []
    teacher = plan.config.teacher
    if plan.teacher is not None and plan.teacher.bytes > room and teacher.placement == "device":
        placement = "auto" if teacher.concat else "zero3"  # which is for one encoder
        found.append(
            f"teacher.placement={placement}: its weights take {plan.teacher.bytes / 1e9:.1f} GB, and a device has"
            f" {room / 1e9:.1f}"
        )
    for stage in plan.stages:
        found += _stage_advice(plan, stage)
    return found


def _stage_advice(plan: Plan, stage: StagePlan) -> list[str]:
    train: TrainConfig = getattr(plan.config, stage.name)
    fitting = [v for v in stage.variants if v.fits >= min(train.micro_batch, -(-train.global_batch // plan.cluster.ranks))]
    if not fitting:
        return _to_make_it_fit(plan, stage)
    best = min(fitting, key=lambda v: v.step.total)
    if stage.chosen in fitting and best.step.total > WORTH_CHANGING * stage.chosen.step.total:
        best = stage.chosen
    said = []
    if best is not stage.chosen:
        why = f"{best.step.total / stage.chosen.step.total:.0%} of a step's time" if stage.chosen in fitting else ""
        why = why or f"{stage.chosen.name} does not fit"
        said.append(f"engine.deepspeed=configs/deepspeed/{best.name}.json for {stage.name}: {why}")
    share = -(-train.global_batch // plan.cluster.ranks)
    rows = min(best.fits, share)
    if rows > train.micro_batch:
        fewer = -(-share // rows)
        said.append(f"{stage.name}.micro_batch={rows}: it fits, and a step has {fewer} micro-batch{'es' * (fewer > 1)} then")
    return said


def _to_make_it_fit(plan: Plan, stage: StagePlan) -> list[str]:
    """Where no layout holds the config's micro-batch. What the config says already is not said again."""
    most = max(stage.variants, key=lambda v: (v.fits, v is stage.chosen))
    checkpoints = plan.config.engine.activation_checkpointing
    if most.fits == 0:
        ways = "larger devices" if checkpoints else "engine.activation_checkpointing=true, or larger devices"
        return [f"{stage.name}: nothing fits, whatever is split: {ways}"]
    layout = "" if most is stage.chosen else f" engine.deepspeed=configs/deepspeed/{most.name}.json"
    said = [f"{stage.name}.micro_batch={most.fits}{layout}: more does not fit"]
    if most.fits < WORTH_CHECKPOINTING and not checkpoints:
        said.append("engine.activation_checkpointing=true: a layer's activations are computed again, and many more rows fit")
    return said
