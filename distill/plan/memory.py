"""Bytes of tensors that a rank holds in training, by category, for each ZeRO stage as DeepSpeed runs it here: float32
parameters, AdamW, bf16 by autocast.

    P parameters, T trained, U that get a gradient, S in tensors too small to be split; W ranks

                   parameters            gradients                  optimizer
    ZeRO 0         4 P                   4 T                        8 T
    ZeRO 1         4 P + 4 T/W           4 U, then part             8 T/W      a copy of T/W that AdamW changes
    ZeRO 2         4 P + 4 T/W           part                       8 T/W
    ZeRO 3         4 P/W + 4 T/W + 4 S   4 T/W                      8 T/W      and 4 (P - S) gathered while a micro-batch passes

T/W and P/W are rounded up: of each group of parameters to a multiple of 2 W (ZeRO 1, 2), of each tensor to one of W (ZeRO 3).

`part`: whole tensors, of which any number lies in this rank's W-th: a large table of tokens is not cut. Under ZeRO 1 to 3
a bucket of reduce_bucket_size numbers is held besides. Offload moves AdamW's copy and state, and ZeRO 3's parameters, to the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from distill.config import KeysConfig, TrainConfig
from distill.plan.shapes import Chunks, Parameter, TaskShape

FLOAT, HALF, ID = 4, 2, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. gathered: whole weights while a micro-batch passes (ZeRO 3); loss: what tiles of keys take;
    host: what offload keeps off the device, of what is counted in the categories before it."""

    parameters: float
    gradients: float
    bucket: float
    optimizer: float
    gathered: float
    queue: float
    keys: float
    activations: float
    loss: float
    host: float

    @property
    def device(self) -> float:
        """The most that is held at once on the device."""
        return sum(asdict(self).values()) - 2 * self.host


def rank_memory(
    shape: TaskShape,
    train: TrainConfig,
    zero: dict[str, Any],
    world_size: int,
    chunks: Chunks,
    *,
    checkpointing: bool,
    rank: int | None = None,
) -> Memory:
    """zero: the section zero_optimization of DeepSpeed's configuration. chunks: of the largest micro-batch. rank: that of which
    gradients are counted; None: the one that holds most."""
    stage, ranks = zero.get("stage", 0), world_size
    part = part_of(shape.parameters, stage, ranks)
    split = sum(-(-p.numel // ranks) for p in shape.parameters)
    moments = 2 * (shape.numel(trained=True) if stage == 0 else part)
    host = FLOAT * (2 * part + moments) if _offloads(zero, "optimizer") else 0
    host += FLOAT * split if _offloads(zero, "param") else 0
    rows = sum(b for b, _ in chunks)
    activations = shape.activations(chunks) + FLOAT * _head_numbers(shape, train) * rows
    if stage == 3:  # whose linear layers cast their matrices again in the backward pass
        activations -= shape.activations.constant
    activations += shape.layer(chunks) if checkpointing else 0
    loss = loss_bytes(shape, train, rows)
    return Memory(
        parameters=FLOAT * _parameters(shape, zero, ranks, part, split),
        gradients=FLOAT * _gradients(shape, zero, ranks, part, rank),
        bucket=FLOAT * _bucket(zero) if stage else 0,
        optimizer=FLOAT * moments,
        gathered=_gathered_bytes(shape, zero, ranks, activations + loss) if stage == 3 else 0.0,
        queue=queue_bytes(shape, train, ranks),
        keys=keys_bytes(shape, train),
        activations=activations,
        loss=loss,
        host=host,
    )


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return zero.get(f"offload_{what}", {}).get("device") == "cpu"


def _bucket(zero: dict[str, Any]) -> float:
    return zero.get("reduce_bucket_size", 500_000_000)


def _parameters(shape: TaskShape, zero: dict[str, Any], ranks: int, part: int, split: int) -> int:
    """Numbers of the weights that a rank keeps, and of the copy of its part that AdamW changes."""
    stage, whole = zero.get("stage", 0), shape.numel()
    if stage == 0:
        return whole
    if stage == 3:
        return split + part + _small(shape, zero, ranks)
    return whole - shape.numel(trained=True) + (ranks + 1) * part


def _small(shape: TaskShape, zero: dict[str, Any], ranks: int) -> int:
    """Numbers in tensors that ZeRO 3 keeps whole on every rank."""
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    return sum(-(-p.numel // ranks) * ranks for p in shape.parameters if p.numel <= threshold)


def _gradients(shape: TaskShape, zero: dict[str, Any], ranks: int, part: int, rank: int | None) -> int:
    stage = zero.get("stage", 0)
    if stage < 2:
        return shape.numel(trained=True, used=stage == 1)
    return part if stage == 3 or _offloads(zero, "optimizer") else _part_of_gradients(shape.parameters, ranks, rank)


def _gathered_bytes(shape: TaskShape, zero: dict[str, Any], ranks: int, passing: float) -> float:
    """ZeRO 3's whole weights. While they are put together or reduced, a bucket is there twice; the pass's own tensors, of
    `passing` bytes, are not there yet, or no more."""
    gathered = FLOAT * max(shape.numel() - _small(shape, zero, ranks), 0.0) if ranks > 1 else 0.0
    prefetched = min(gathered, FLOAT * zero.get("stage3_prefetch_bucket_size", 50_000_000))
    reduced = FLOAT * min(shape.numel(trained=True, used=True), _bucket(zero)) * (1 + 1 / ranks)
    return gathered + max(prefetched - passing, reduced - gathered - passing, 0)


def part_of(parameters: Sequence[Parameter], stage: int, ranks: int) -> int:
    """A rank's part of the trained numbers, padding too."""
    if stage == 3:
        return sum(-(-p.numel // ranks) for p in parameters if p.is_trained)
    groups = {p.group for p in parameters if p.is_trained}
    totals = [sum(p.numel for p in parameters if p.is_trained and p.group == group) for group in groups]
    return sum(2 * -(-total // (2 * ranks)) for total in totals)


def _part_of_gradients(parameters: Sequence[Parameter], ranks: int, rank: int | None) -> int:
    """Numbers in the whole tensors of which a part lies in a rank's W-th of each group of parameters."""
    groups: list[tuple[int, list[tuple[int, int]]]] = []  # size of a part, and where each tensor begins and ends
    for group in {p.group for p in parameters if p.is_trained}:
        sizes = [p.numel for p in parameters if p.is_trained and p.group == group]
        ends = accumulate(sizes)
        groups.append((2 * -(-sum(sizes) // (2 * ranks)), [(end - numel, end) for numel, end in zip(sizes, ends, strict=True)]))
    # where no tensor of any group begins, a rank holds none that the one before it does not hold too
    wanted = {start // part for part, spans in groups for start, _ in spans} if rank is None else {rank}
    return max(
        sum(end - start for part, spans in groups for start, end in spans if start < (r + 1) * part and end > r * part)
        for r in wanted
    )


def queue_bytes(shape: TaskShape, train: TrainConfig, ranks: int) -> float:
    """K (2 d + 8), or a W-th of it where the queue is sharded."""
    if not isinstance(train, KeysConfig) or not train.needs_keys:
        return 0.0
    slots = -(-train.queue // ranks) if train.queue_placement == "sharded" else train.queue
    return float(slots * (HALF * shape.key_width + ID))


def keys_bytes(shape: TaskShape, train: TrainConfig) -> float:
    """Of the global batch: G (2 d + 8) of teacher vectors and ids; for stages without a teacher's keys, G (V - 1) 4 d."""
    if isinstance(train, KeysConfig):
        return float(train.global_batch * (HALF * shape.key_width + ID)) if train.needs_keys else 0.0
    return float(train.global_batch * (shape.views - 1) * FLOAT * shape.width)


def loss_bytes(shape: TaskShape, train: TrainConfig, rows: int) -> float:
    """While keys are held against a micro-batch of b rows: k b (tile + 3 d) + tile d numbers, k kinds of queries. rows: those
    encoded; the replayed ones are held against no others."""
    if not isinstance(train, KeysConfig):
        return float(FLOAT * rows * shape.views / shape.encoded * train.global_batch * 2)
    if not train.needs_keys:
        return 0.0
    return float(FLOAT * (kinds(train) * rows * (train.tile + 3 * shape.key_width) + train.tile * shape.key_width))


def kinds(train: KeysConfig) -> int:
    """Sets of queries held against the keys: the student's for ckd; the student's and the teacher's for congen."""
    return bool(train.weights.get("ckd")) + 2 * bool(train.weights.get("congen"))


def _head_numbers(shape: TaskShape, train: TrainConfig) -> int:
    """Of a row, kept for backward beside the encoder's: projected, normalised, and a difference or two a term."""
    terms = len([w for w in train.weights.values() if w]) if isinstance(train, KeysConfig) else 2
    return (3 + 2 * terms) * shape.key_width
