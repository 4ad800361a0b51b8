"""A plan as JSON: bytes, seconds, dollars, operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill.plan.plan import Plan, StagePlan
from distill.plan.time import Cluster
from distill.plan.wire import Sent


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures: bytes, seconds, dollars, operations."""
    return {
        "sentences": plan.corpus.sentences,
        "tokens_a_sentence": plan.corpus.tokens,
        "how": plan.corpus.how,
        "shards": plan.shard_bytes,
        "teacher": None
        if plan.teacher is None
        else {
            "parameters": plan.teacher.numel,
            "bytes": plan.teacher.bytes,
            "operations": plan.teacher_operations,
            "seconds": plan.teacher_seconds,
        },
        "cluster": {
            "nodes": plan.cluster.nodes,
            "ranks_a_node": plan.cluster.ranks_a_node,
            "name": plan.cluster.name,
            "is_bf16": plan.cluster.is_bf16,
            "device": plan.cluster.device.model_dump(),
            "assumed": plan.cluster.assumed.model_dump(),
        },
        "stages": {stage.name: _stage_json(stage, plan.cluster) for stage in plan.stages},
        "seconds": plan.seconds,
        "dollars": plan.dollars,
        "advice": plan.advice,
        "measured": plan.measured,
    }


def _stage_json(stage: StagePlan, cluster: Cluster) -> dict[str, Any]:
    return {
        "parameters": stage.shape.numel(),
        "trained": stage.shape.numel(trained=True),
        "steps": stage.steps,
        "seconds_a_step": asdict(stage.step) | {"total": stage.step.total},
        "seconds": stage.seconds,
        "once": {"seconds": stage.once_seconds, "bytes": stage.once_bytes},
        "dollars": stage.dollars,
        "deepspeed": stage.chosen.name,
        "variants": {
            variant.name: {
                "memory": asdict(variant.memory) | {"device": variant.memory.device},
                "largest_micro_batch": variant.fits,
                "seconds_a_step": variant.step.total,
                "received": _received(variant.sent, cluster),
            }
            for variant in stage.variants
        },
    }


def _received(sent: Sequence[Sent], cluster: Cluster) -> dict[str, float]:
    """Bytes a step that a rank receives, by what, and by link."""
    by_what: dict[str, float] = {}
    for each in sent:
        by_what[each.what] = by_what.get(each.what, 0.0) + each.received(cluster.ranks)
    nodes, a_node = cluster.nodes, cluster.ranks_a_node
    return by_what | {
        "inside": sum(each.inside(a_node, nodes) for each in sent),
        "between": sum(each.between(a_node, nodes) for each in sent),
    }
