"""Memory, communication and time of one training step on one rank, as DeepSpeed runs it: float32 parameters, AdamW, autocast.

Parameters: P all, T trained, S in tensors that ZeRO 3 keeps whole. W ranks, n micro-batches of b rows.

    bytes   parameters             gradients       AdamW    received: whole tensors, by operation
    ZeRO 0  4 P                    4 T             8 T      4 T all-reduce
    ZeRO 1  4 P + 4 T/W            4 T             8 T/W    4 T all-reduce, 4 T all-gather
    ZeRO 2  4 P + 4 T/W            whole tensors   8 T/W    4 T all-reduce n times (measured, no reduce-scatter), 4 T all-gather
    ZeRO 3  4 P/W + 4 T/W + 4 S    4 T/W           8 T/W    4 T reduce-scatter and 4 (P - S) all-gather n times, 4 S all-gather
            and 4 (P - S) gathered during a micro-batch (received 2 n times where P is above stage3_max_live_parameters)

The second term of the parameters is the copy that AdamW updates. ZeRO 1 to 3 also hold a bucket of reduce_bucket_size elements.
Offload moves AdamW's copy and state, and ZeRO 3's parameters, to the host.

Losses: G global batch, K queue, k query sets, d width of keys; V views of a row.

            queue and batch            workspace                        FLOPs            received
    keys    (K or K/W + G) (2 d + 8)   4 k b (tile + 3 d) + 4 tile d    4 k b (G + K) d  G (2 d + 8) all-gather
            of a sharded queue, n times: k G 4 d + G 8 all-gather of queries, and k G W (4 d + 4) all-to-all of answers
    views   4 G (V - 1) d              8 b V G                          6 b G (V - 1) d  4 G (V - 1) d all-gather, all-reduce

A rank with a W-th of the queue compares the queries of all ranks with it: workspace 4 k W b (min(tile, K/W) + 5 d), with the
answers that it sends and receives.

relational, of s nested sizes d_1, d_2, ..., adds b G (2 d_t + 6 (d_1 + d_2 ...)) FLOPs for the teacher's similarities and those
of each size, and workspace 4 b G (s + 5) + 4 G (d_t + 3 d + d_1 + d_2 ...).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.plan.devices import Cluster
from distill.plan.shapes import Chunks, TaskShape
from distill.plan.zero_partition import ZeroSettings, gradient_partition_sizes, padded, partition_size
from distill.training.tasks.hpd import HpdConfig

FLOAT, HALF, HASH = 4, 2, 8  # bytes of a float32, a float16 and a text hash
ADAM_BYTES = 28  # per element: gradient, value and two moments read, value and moments written
RING_FACTORS = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}  # received, of (W-1)/W of the tensor


class Collective(NamedTuple):
    """Calls of one operation in a step. tensor_bytes: of its whole tensors, over all calls."""

    carries: str
    operation: str
    tensor_bytes: float
    calls: int


def rank_memory(shape: TaskShape, zero: ZeroSettings, ranks: int, chunks: Chunks, rank: int | None = None) -> dict[str, float]:
    """Bytes of one rank by category. device: the most at one time; host: what is offloaded, which `device` leaves out.

    chunks: of the largest micro-batch. rank: whose gradients are counted; None for the rank that holds most.
    """
    numel, trained = shape.num_parameters, shape.num_trained
    part = partition_size(shape.parameters, zero.stage, ranks)
    texts = sum(b for b, _ in chunks)
    activations = shape.activations(chunks) + FLOAT * (3 + 2 * shape.num_terms) * shape.key_dim * texts  # with the loss terms'
    workspace = loss_workspace(shape, texts, ranks)
    host = FLOAT * 4 * part if zero.offloads_optimizer else 0  # the copy, its gradients and two moments
    gathered = 0.0
    if zero.stage == 0:
        parameters, gradients = numel, trained
    elif zero.stage < 3:
        parameters, gradients = numel - trained + (ranks + 1) * part, trained
        if zero.stage == 2:
            held = gradient_partition_sizes(shape.parameters, ranks)
            gradients = part if zero.offloads_optimizer else int(held.max() if rank is None else held[rank])
    else:
        split = sum(-(-p.numel // ranks) for p in shape.parameters)
        persistent = ranks * sum(-(-p.numel // ranks) for p in shape.parameters if zero.is_persistent(p))
        parameters, gradients = split + part + persistent, part
        host += FLOAT * split if zero.offloads_parameters else 0
        activations -= shape.activations.constant  # linear layers cast their matrices again in the backward pass
        # a bucket is held twice while weights are gathered or gradients reduced, before or after what the pass holds
        gathered = FLOAT * max(numel - persistent, 0) if ranks > 1 else 0.0
        prefetched = min(gathered, FLOAT * zero.stage3_prefetch_bucket_size)
        reduced = FLOAT * min(trained, zero.reduce_bucket_size) * (1 + 1 / ranks)
        gathered += max(prefetched - activations - workspace, reduced - gathered - activations - workspace, 0)
    categories = {
        "parameters": FLOAT * parameters,
        "gradients": FLOAT * gradients,
        "optimizer": FLOAT * 2 * part,
        "reduce_bucket": FLOAT * zero.reduce_bucket_size if zero.stage else 0,
        "gathered": gathered,
        "queue": queue_bytes(shape, ranks),
        "keys": batch_bytes(shape),
        "activations": activations,
        "loss": workspace,
    }
    return categories | {"device": sum(categories.values()) - host, "host": host}


def queue_bytes(shape: TaskShape, ranks: int) -> float:
    """Bytes of the queue's keys and hashes on one rank."""
    if not shape.query_sets:
        return 0.0
    rows = -(-shape.train.queue // ranks) if shape.train.queue_placement == "sharded" else shape.train.queue
    return float((HALF * shape.key_dim + HASH) * rows)


def batch_bytes(shape: TaskShape) -> float:
    """Bytes of the keys and hashes, or of the other views, of the global batch."""
    per_row = FLOAT * (shape.num_views - 1) * shape.student_dim + (HALF * shape.key_dim + HASH) * bool(shape.query_sets)
    return float(shape.train.global_batch * per_row)


def loss_workspace(shape: TaskShape, texts: float, ranks: int) -> float:
    """Bytes while the views among `texts` encoded texts are compared with each other, with a tile of keys, or with the texts of
    the global batch."""
    train = shape.train
    return (
        _views_workspace(shape, texts)
        + _keys_workspace(shape, texts, ranks)
        + sum(
            FLOAT * train.global_batch * (texts * (len(sizes) + 5) + shape.teacher_dim + 3 * sizes[0] + sum(sizes))
            for sizes in _relational_sizes(train)
        )
    )


def _keys_workspace(shape: TaskShape, texts: float, ranks: int) -> float:
    train, dim = shape.train, shape.key_dim
    if not shape.query_sets:
        return 0.0
    workspace = shape.query_sets * texts * (train.tile + 3 * dim) + train.tile * dim
    if ranks > 1 and train.queue and train.queue_placement == "sharded":
        part = min(train.tile, -(-train.queue // ranks))
        workspace = max(workspace, shape.query_sets * ranks * texts * (part + 5 * dim) + part * dim)
    return float(FLOAT * workspace)


def _relational_sizes(train: Any) -> list[list[int]]:
    """The nested sizes that the relational term compares, largest first; empty without the term."""
    has_term = isinstance(train, HpdConfig) and train.weights.get("relational")
    return [[train.dim, *train.nested]] if has_term else []


def _views_workspace(shape: TaskShape, texts: float) -> float:
    if shape.query_sets:
        return 0.0
    train = shape.train
    views = texts * shape.num_views / shape.texts_per_row
    return float(FLOAT * 2 * views * train.global_batch) if shape.num_views > 1 else 0.0


def loss_flops(shape: TaskShape, rows: float) -> float:
    """Forward and backward, of `rows` rows compared with all keys, or with the other views of the global batch."""
    train, per_row = shape.train, 6.0 * shape.train.global_batch * (shape.num_views - 1) * shape.student_dim
    if shape.query_sets:
        per_row += 4.0 * shape.query_sets * (train.global_batch + train.queue) * shape.key_dim
    for sizes in _relational_sizes(train):
        per_row += train.global_batch * (2.0 * shape.teacher_dim + 6.0 * sum(sizes))
    return rows * per_row


def collectives_per_step(shape: TaskShape, zero: ZeroSettings, ranks: int, num_micro: int) -> list[Collective]:
    """All collectives of a step, except the few numbers of norms and sums."""
    return [*_loss_collectives(shape, ranks, num_micro), *_zero_collectives(shape, zero, ranks, num_micro)] if ranks > 1 else []


def _loss_collectives(shape: TaskShape, ranks: int, num_micro: int) -> list[Collective]:
    train, sets, dim = shape.train, shape.query_sets, shape.key_dim
    rows = padded(train.global_batch, ranks)  # a rank with a row less sends a row of zeros
    if shape.num_views > 1:
        views = FLOAT * rows * (shape.num_views - 1) * shape.student_dim
        hashes = HASH * rows * shape.num_views
        return [Collective("views", "all_gather", views + hashes, 2), Collective("views", "all_reduce", views, 1)]
    if not sets:
        return []
    found = [Collective("keys", "all_gather", rows * (HALF * dim + HASH), 2)]
    if train.queue_placement == "sharded" and train.queue:
        mask = (HASH + (HALF * dim if train.same_meaning is not None else 0)) * bool(train.weights.get("ckd"))
        found.append(Collective("queries", "all_gather", rows * (FLOAT * sets * dim + mask), 2 * num_micro))
        found.append(Collective("answers", "all_to_all", rows * FLOAT * sets * (dim + 1), num_micro))
    return found


def _zero_collectives(shape: TaskShape, zero: ZeroSettings, ranks: int, num_micro: int) -> list[Collective]:
    times = num_micro if zero.stage >= 2 else 1
    reduce_calls = times * -(-shape.num_trained // int(zero.reduce_bucket_size))
    if zero.stage < 3:
        reduced = Collective("gradients", "all_reduce", FLOAT * shape.num_trained * times, reduce_calls)
        gathered = FLOAT * ranks * partition_size(shape.parameters, zero.stage, ranks)
        groups = len({p.group for p in shape.parameters if p.is_trained})
        return [reduced, Collective("parameters", "all_gather", gathered, groups)] if zero.stage else [reduced]
    persistent = [padded(p.numel, ranks) for p in shape.parameters if zero.is_persistent(p)]
    large = sum(padded(p.numel, ranks) for p in shape.parameters) - sum(persistent)
    gradients = ranks * partition_size(shape.parameters, zero.stage, ranks)
    is_kept = shape.num_parameters <= min(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
    passes = num_micro if is_kept else 2 * num_micro
    gather_calls = passes * -(-large // int(zero.stage3_prefetch_bucket_size)) + len(persistent)
    return [
        Collective("gradients", "reduce_scatter", FLOAT * gradients * num_micro, reduce_calls),
        Collective("parameters", "all_gather", FLOAT * (large * passes + sum(persistent)), gather_calls),
    ]


def bytes_received(sent: Sequence[Collective], ranks_per_node: int, nodes: int) -> dict[str, float]:
    """What a rank receives: by what the collectives carry, in total, and by link.

    Ranks of a node divide what all of them need from other nodes; an all-to-all brings each its own.
    """
    received, ranks = defaultdict(float, total=0.0, inside_node=0.0, between_nodes=0.0), ranks_per_node * nodes
    for each in sent:
        ring_bytes = RING_FACTORS[each.operation] * each.tensor_bytes
        total, between = ring_bytes * (ranks - 1) / ranks, ring_bytes * (nodes - 1) / nodes
        is_own = each.operation == "all_to_all"
        received[each.carries] += total
        received["total"] += total
        received["inside_node"] += total - between if is_own else total * (ranks_per_node > 1)
        received["between_nodes"] += between if is_own else between / ranks_per_node
    return dict(received)


def step_time(
    shape: TaskShape, zero: ZeroSettings, cluster: Cluster, sent: Sequence[Collective], micro_batches: Sequence[Chunks]
) -> dict[str, float]:
    """Seconds of one step, by activity and in total, on the rank that has most to do. Nothing overlaps.

    micro_batches: the chunks of each micro-batch of a rank, in rows of the global batch.
    compute: forward FLOPs x flops_factor (and 1 more where gradients of views are cached) / (peak x MFU), and of each chunk at
    least the device's launch x layers; loss: in float32. optimizer: memory traffic, or over the link to the host and back.
    communication: over the slower of the links inside and between nodes, and a latency per call.
    """
    device, chunks = cluster.device, [chunk for chunks in micro_batches for chunk in chunks]
    rate = cluster.peak_flops * device.student
    least = device.launch * shape.num_layers / 3  # of forward and backward, three forward passes
    forward = sum(max(shape.forward_flops([chunk]) / rate, least) for chunk in chunks)
    is_cached = shape.num_views > 1 and len(micro_batches) > 1
    compute = forward * (shape.flops_factor + is_cached) * shape.texts_per_row
    loss = loss_flops(shape, sum(b for b, _ in chunks)) / (device.fp32 * device.student)
    updated = shape.num_trained / (cluster.ranks if zero.stage else 1)
    optimizer = ADAM_BYTES * updated / device.bandwidth
    if zero.offloads_optimizer:
        moved = 2 * FLOAT * updated  # gradients to the host and parameters back
        moved += FLOAT * shape.num_parameters / cluster.ranks * len(micro_batches) * zero.offloads_parameters
        optimizer = (ADAM_BYTES * updated + moved) / device.host
    received = bytes_received(sent, cluster.ranks_per_node, cluster.nodes)
    communication = max(received["inside_node"] / device.inside, received["between_nodes"] / device.between)
    communication += sum(each.calls for each in sent) * cluster.assumed.latency
    seconds = {"compute": compute, "loss": loss, "optimizer": optimizer, "communication": communication}
    return seconds | {"total": compute + loss + optimizer + communication}
