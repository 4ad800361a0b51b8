"""Bytes that a rank's collectives carry in a step, and how they divide over the links inside and between nodes.

    what        collective      whole tensor, bytes          times a step (n micro-batches)
    keys, ids   all-gather      G (2 d + 8)                  1
    queries     all-gather      k G 4 d + G 8, back:         sharded queue: all-to-all of k G W (4 d + 4)
    gradients   all-reduce      4 T (ZeRO 0), 4 U (1, 2)     1; under ZeRO 2, n
                reduce-scatter  4 U (ZeRO 3)                 n
    parameters  all-gather      4 T (ZeRO 1, 2)              1
                                4 (P - S) (ZeRO 3)           n; 2 n where the model is above stage3_max_live_parameters
                                4 S (ZeRO 3)                 1

A rank receives (W-1)/W of an all-gather's or reduce-scatter's whole tensor, and twice that of an all-reduce's. Measured: ZeRO 1
and 2 reduce a whole bucket on every rank (all-reduce), not each its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.config import KeysConfig, TrainConfig
from distill.plan.memory import FLOAT, HALF, ID, kinds, part_of
from distill.plan.shapes import TaskShape

SHARES = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Sent:
    """One kind of collective in a step. size: bytes of its whole tensors, over the step; times: how many it is called."""

    what: str
    collective: str
    size: float
    times: int

    def received(self, ranks: int) -> float:
        """Bytes that a rank receives of it, by a ring."""
        return SHARES[self.collective] * self.size * (ranks - 1) / ranks

    def inside(self, ranks_a_node: int, nodes: int) -> float:
        """Bytes that a rank receives over its node's links: all of it, but for what each rank has answers of its own to."""
        if self.collective == "all_to_all":
            return self.size * (ranks_a_node - 1) / (ranks_a_node * nodes)
        return self.received(ranks_a_node * nodes) if ranks_a_node > 1 else 0.0

    def between(self, ranks_a_node: int, nodes: int) -> float:
        """Bytes that a rank's link to other nodes brings in: of what all ranks of a node need, each takes its share; of an
        all-to-all each needs something else."""
        shared_by = 1 if self.collective == "all_to_all" else ranks_a_node
        return SHARES[self.collective] * self.size * (nodes - 1) / nodes / shared_by


def sent_in_a_step(shape: TaskShape, train: TrainConfig, zero: dict[str, Any], ranks: int, num_micro: int) -> list[Sent]:
    """All collectives of a step but the few numbers of norms and sums."""
    return [] if ranks == 1 else [*_keys(shape, train, ranks, num_micro), *_weights(shape, zero, ranks, num_micro)]


def _keys(shape: TaskShape, train: TrainConfig, ranks: int, num_micro: int) -> list[Sent]:
    rows = -(-train.global_batch // ranks) * ranks  # a rank with a row less sends a row of zeros
    if not isinstance(train, KeysConfig):
        views = rows * (shape.views - 1) * FLOAT * shape.width
        return [Sent("views", "all_gather", views + rows * ID * shape.views, 2), Sent("views", "all_reduce", views, 1)]
    if not train.needs_keys:
        return []
    found = [Sent("keys and ids", "all_gather", rows * (HALF * shape.key_width + ID), 2)]
    if train.queue_placement == "sharded" and train.queue:
        of_kinds = kinds(train) * rows * FLOAT
        masked = ID + (HALF * shape.key_width if train.same_meaning is not None else 0) if train.weights.get("ckd") else 0
        found.append(Sent("queries", "all_gather", of_kinds * shape.key_width + rows * masked, 2 * num_micro))
        found.append(Sent("answers", "all_to_all", of_kinds * (shape.key_width + 1), num_micro))
    return found


def _weights(shape: TaskShape, zero: dict[str, Any], ranks: int, num_micro: int) -> list[Sent]:
    stage = zero.get("stage", 0)
    trained, used = FLOAT * shape.numel(trained=True), FLOAT * shape.numel(trained=True, used=True)
    bucket = FLOAT * zero.get("reduce_bucket_size", 500_000_000)
    if stage == 0:
        return [Sent("gradients", "all_reduce", trained, -(-trained // bucket))]
    if stage < 3:
        times = num_micro if stage == 2 else 1
        groups = len({p.group for p in shape.parameters if p.is_trained})
        return [
            Sent("gradients", "all_reduce", used * times, times * -(-used // bucket)),
            Sent("parameters", "all_gather", FLOAT * ranks * part_of(shape.parameters, stage, ranks), groups),
        ]
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    small = [p for p in shape.parameters if p.numel <= threshold]
    large = FLOAT * sum(_padded(p.numel, ranks) for p in shape.parameters if p.numel > threshold)
    reach = min(zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9))
    passes = num_micro * (1 if shape.numel() <= reach else 2)
    gathers = -(-large // (FLOAT * zero.get("stage3_prefetch_bucket_size", 50_000_000)))
    gradients = FLOAT * sum(_padded(p.numel, ranks) for p in shape.parameters if p.is_used)
    whole = large * passes + FLOAT * sum(_padded(p.numel, ranks) for p in small)
    return [
        Sent("gradients", "reduce_scatter", gradients * num_micro, num_micro * int(-(-used // bucket))),
        Sent("parameters", "all_gather", whole, passes * int(gathers) + len(small)),
    ]


def _padded(numel: int, ranks: int) -> int:
    return -(-numel // ranks) * ranks
