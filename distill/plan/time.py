"""Seconds of a step and of embedding, and what they cost.

forward and backward   F = 3 x forward (and 1 x more each with activation checkpointing and with cached gradients)
                       / (peak x MFU); nothing of a frozen encoder, which reads all sentences once before the first step
                       no chunk of a micro-batch takes less than launch x layers
loss                   4 k b N d operations, in float32, / (float32 peak x MFU)      N = G + K keys, two products a tile
                       relational: b G (2 d_t + 6 (d_1 + d_2 ...)), the teacher's likeness and each nested size's
optimizer              28 bytes a trained number of this rank / the memory's bandwidth; 28 + 8 over the host's, offloaded
collectives            the slower of a link's bytes / its rate, inside and between nodes, + latency each; nothing overlaps
teacher                2 x multiply-adds of all tokens, padding too / (peak x MFU x devices)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill.config import HpdConfig, KeysConfig, TrainConfig
from distill.plan.devices import Assumed, Device
from distill.plan.memory import kinds
from distill.plan.shapes import Chunks, Growth, TaskShape
from distill.plan.wire import Sent

ADAM_BYTES = 28  # gradient, value and two moments read, value and moments written


@dataclass(frozen=True)
class Cluster:
    """nodes x ranks_a_node devices of one kind. is_bf16: matrix products are in bf16. name: of the device, in the table."""

    nodes: int
    ranks_a_node: int
    name: str
    device: Device
    assumed: Assumed
    is_bf16: bool

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_a_node

    def dollars(self, seconds: float) -> float:
        return seconds / 3600 * self.ranks * self.device.dollars


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the rank that has most to do."""

    compute: float
    loss: float
    optimizer: float
    collectives: float

    @property
    def total(self) -> float:
        return self.compute + self.loss + self.optimizer + self.collectives


def step_time(
    shape: TaskShape,
    train: TrainConfig,
    zero: dict[str, Any],
    cluster: Cluster,
    sent: Sequence[Sent],
    micro: Sequence[Chunks],
    *,
    checkpointing: bool,
) -> StepTime:
    """zero: the section zero_optimization of DeepSpeed's configuration; micro: the chunks of each of a rank's micro-batches."""
    device = cluster.device
    cached = not isinstance(train, KeysConfig) and len(micro) > 1
    passes = shape.passes + (checkpointing and shape.passes > 1) + cached
    rate, least = device.peak(cluster.is_bf16) * device.student, device.launch * shape.layers / 3
    compute = sum(max(shape.flops([chunk]) / rate, least) for chunks in micro for chunk in chunks) * passes * shape.encoded
    rows = sum(b for chunks in micro for b, _ in chunks)
    held = shape.numel(trained=True) / (cluster.ranks if zero.get("stage", 0) else 1)
    offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"
    moved = 8 * held + (4.0 * shape.numel() / cluster.ranks * len(micro) if "offload_param" in zero else 0)
    update = (ADAM_BYTES * held + moved) / device.host if offloads else ADAM_BYTES * held / device.bandwidth
    return StepTime(
        compute,
        loss_operations(shape, train, rows) / (device.fp32 * device.student),
        update,
        sum(_seconds(each, cluster) for each in sent),
    )


def loss_operations(shape: TaskShape, train: TrainConfig, rows: int) -> float:
    """Of `rows` queries: against N keys twice, or against each other's views, forward and backward."""
    if not isinstance(train, KeysConfig):
        return 6.0 * rows * train.global_batch * (shape.views - 1) * shape.width
    keys = train.global_batch + train.queue if train.needs_keys else 0
    against_keys = 4.0 * kinds(train) * rows * keys * shape.key_width
    if not isinstance(train, HpdConfig) or not train.weights.get("relational"):
        return against_keys
    return against_keys + rows * train.global_batch * (2.0 * shape.teacher_width + 6.0 * (train.dim + sum(train.nested)))


def _seconds(sent: Sent, cluster: Cluster) -> float:
    inside = sent.inside(cluster.ranks_a_node, cluster.nodes) / cluster.device.inside
    between = sent.between(cluster.ranks_a_node, cluster.nodes) / cluster.device.between
    return max(inside, between) + sent.times * cluster.assumed.latency


def teacher_seconds(flops: Growth, lengths: Sequence[float], sentences: int, cluster: Cluster) -> tuple[float, float]:
    """(operations, seconds) of embedding: a sample's lengths stand for those of all sentences."""
    per_sentence = flops([(1, float(length)) for length in lengths]) / len(lengths)
    operations = sentences * per_sentence
    rate = cluster.device.peak(cluster.is_bf16) * cluster.device.teacher * cluster.ranks
    return operations, operations / cluster.assumed.padding / rate
