"""Bytes that a real training step sends and holds, counted on a rank of a real or a fake process group."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from torch.utils._pytree import tree_iter

from distill.config import RunConfig

CPU = torch.device("cpu")
NEVER = 10**9
WARM_UP_STEPS = 2  # ZeRO-3 records the order of parameters and broadcasts it, again whenever the chunks are other ones
OPERATIONS = {  # of torch's ProcessGroup; the names with a base were in use before torch 2.13
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather_single": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "alltoall_base": "all_to_all",
    "broadcast": "broadcast",
}
RING_FACTORS = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "broadcast": 1,
}  # x (W-1)/W


class Collectives:
    """While active, adds up the bytes of the whole tensors of this process's collectives by operation."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.before: Callable[[], None] = lambda: None  # called before each
        there = [method for method in OPERATIONS if hasattr(dist.ProcessGroup, method)]
        self._own = {method: getattr(dist.ProcessGroup, method) for method in there}

    def __enter__(self) -> None:
        for method, own in self._own.items():
            setattr(dist.ProcessGroup, method, self._counting(method, own))

    def __exit__(self, *_: object) -> None:
        for method, own in self._own.items():
            setattr(dist.ProcessGroup, method, own)

    def _counting(self, method: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def counting(group: Any, *arguments: Any, **options: Any) -> Any:
            self.before()
            sides = [sum(t.nbytes for t in tree_iter(side) if isinstance(t, torch.Tensor)) for side in arguments]
            self.bytes[OPERATIONS[method]] += max(sides)
            return own(group, *arguments, **options)

        return counting


class _Enough(Exception):
    pass


def _bytes(tree: Any) -> int:
    """Bytes of the distinct storages of a tree's tensors: a view counts as the storage that it keeps alive."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_iter(tree) if isinstance(t, torch.Tensor)}
    return sum(found.values())


def count_step(config: RunConfig, *, counts_activations: bool = True) -> dict[str, Any]:
    """Runs a few steps of the stage ckd on this rank and returns, of the last one, bytes by category.

    sent: whole tensors of its collectives, by operation; received: of these, what this rank receives in a ring; parameters,
    optimizer, queue: between steps; gradients, reduce_bucket: the most at the end of a pass or at a collective; keys: of the
    batch; activations: what the largest micro-batch's forward pass leaves for its backward pass; tokens: its shapes; peak: the
    most at one time in a step beyond what lives between steps. counts_activations: without it, activations and peak are not
    counted, which takes some microseconds per operation: ZeRO-3 cuts every gradient into one part per rank.
    """
    from distill.training import training_stage

    build, engines, marks = training_stage.build_engine, [], []
    held: dict[str, Any] = dict.fromkeys(("activations", "gradients", "reduce_bucket"), 0)
    live, collectives = LiveBytes(), Collectives()

    def built(*arguments: Any, **options: Any) -> Any:
        engines.append(_instrument(build(*arguments, **options), live, held))
        collectives.before = lambda: _record_gradients(engines[-1], held)
        return engines[-1]

    def end_of_step(step: int) -> bool:
        marks.append(Counter(collectives.bytes))
        held["peak"] = live.peak - held.get("start", 0)
        if step > WARM_UP_STEPS and not (marks[-1] - marks[-2])["broadcast"]:
            raise _Enough
        held["activations"] = held["gradients"] = held["reduce_bucket"] = 0
        live.peak = held["start"] = live.live
        return False

    training_stage.build_engine = built
    try:
        with collectives, live if counts_activations else nullcontext(), suppress(_Enough):
            config.stage_of("ckd").run(CPU, end_of_step)
    finally:
        training_stage.build_engine = build
    sent = dict(marks[-1] - marks[-2])
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    received = {kind: RING_FACTORS[kind] * share * size for kind, size in sent.items()}
    held |= {"sent": sent, "received": received, **_between_steps(engines[-1])}
    engines[-1].destroy()
    return held


def _instrument(engine: Any, live: LiveBytes, held: dict[str, Any]) -> Any:
    """Makes the engine's passes record the bytes that live after them."""
    forward, backward = engine.forward, engine.backward
    module = engine.module

    def whole() -> int:
        return _bytes([p.data for p in module.parameters()])

    def counted_forward(part: Any, context: Any) -> Any:
        before, weights = live.live, whole()
        result = forward(part, context)
        left = live.live - before - (whole() - weights)  # ZeRO-3 gathers weights meanwhile
        if left >= held["activations"]:
            held["activations"] = left
            held["tokens"] = [tuple(chunk["input_ids"].shape) for chunk in part.tokens]
        if context.keys is not None:
            held["keys"] = _bytes([context.keys.vectors, context.keys.hashes])
            held["queue"] = context.keys.queue.num_bytes
        return result

    def counted_backward(loss: Any) -> Any:
        def begun(grad: torch.Tensor) -> torch.Tensor:
            ended = torch.autograd.Variable._execution_engine.queue_callback
            ended(lambda: _record_gradients(engine, held))
            return grad

        loss.register_hook(begun)
        result = backward(loss)
        _record_gradients(engine, held)
        return result

    engine.forward, engine.backward = counted_forward, counted_backward
    return engine


def _record_gradients(engine: Any, held: dict[str, Any]) -> None:
    gradients, bucket = _gradients(engine)
    held["gradients"], held["reduce_bucket"] = max(held["gradients"], gradients), max(held["reduce_bucket"], bucket)


def _gradients(engine: Any) -> tuple[int, int]:
    optimizer = engine.optimizer
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    kept: Iterable[Any] = [
        [p.grad for p in engine.module.parameters()],
        getattr(optimizer, "averaged_gradients", {}),
        getattr(optimizer, "grad_partitions_flat_buffer", None),
        [group.grad for group in getattr(optimizer, "single_partition_of_fp32_groups", [])],
    ]
    return _bytes([kept, buckets]) - _bytes(buckets), _bytes(buckets)


def _between_steps(engine: Any) -> dict[str, int]:
    optimizer = engine.optimizer
    masters = [getattr(optimizer, n, []) for n in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")]
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = [[getattr(p, "ds_tensor", p.data), p.data] for p in engine.module.parameters()]
    return {"parameters": _bytes([weights, masters]), "optimizer": _bytes([list(s.values()) for s in inner.state.values()])}


def start_fake(world_size: int) -> None:
    """Makes this process rank 0 of `world_size` ranks that do not exist: every collective succeeds at once, on its own data."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def start_deepspeed() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
