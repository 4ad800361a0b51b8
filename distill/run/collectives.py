"""Collectives; no-ops without a process group.

Gathers, exchanges and sums count the bytes that this rank receives: (W-1)/W of the result of a gather or exchange, twice that
of a sum. Broadcasts, barriers, and the gradients and parameters that DeepSpeed sends are not counted.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_received = 0


class FailedElsewhere(OSError):
    """Another rank has failed, and reports why."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def bytes_received() -> int:
    """Bytes that this rank has received so far in counted collectives, without the transport's overhead."""
    return _received


def _count(tensor: Tensor, times: int = 1) -> None:
    """tensor: the result of a collective on this rank."""
    global _received
    _received += times * tensor.nbytes * (world_size() - 1) // world_size()


def barrier() -> None:
    if is_distributed():
        on_gpu = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def any_rank(value: bool) -> bool:
    """Whether `value` is true on any rank."""
    if not is_distributed():
        return value
    found = torch.tensor(value, dtype=torch.int32, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def reduce_sums(sums: dict[str, Tensor]) -> dict[str, float]:
    """Each scalar summed over ranks; every rank passes the same names."""
    values = add_over_ranks(torch.stack([sums[name].reshape(()) for name in sorted(sums)]))
    return dict(zip(sorted(sums), values.tolist(), strict=True))


def from_rank_0(value: Any, device: torch.device, group: Any = None) -> Any:
    """Rank 0's JSON-able value, on every rank."""
    if not is_distributed():
        return value
    text = json.dumps(value).encode() if rank() == 0 else b""
    size = torch.tensor([len(text)], dtype=torch.int64, device=device)
    dist.broadcast(size, src=0, group=group)
    data = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if rank() == 0:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, src=0, group=group)
    return json.loads(data.cpu().numpy().tobytes())


def gather(rows: Tensor) -> Tensor:
    """The tensors of all ranks, which have the same shape, stacked: [W, ...]; no gradient."""
    if not is_distributed():
        return rows[None]
    gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    _count(gathered)
    return gathered.view(world_size(), *rows.shape)


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """The rows of all ranks in global order, [total, ...], where rank r holds the rows r, r + W, r + 2W, ...; no gradient.

    Ranks hold ceil or floor of total / W rows. A rank receives (W-1)/W x total rows.
    """
    if not is_distributed():
        return rows
    padded = rows.new_zeros((-(-total // world_size()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return gather(padded).transpose(0, 1).flatten(0, 1)[:total]


def exchange(parts: Tensor) -> Tensor:
    """All-to-all: sends parts[r] of [W, ...] to rank r; returns the parts for this rank, [W, ...]; no gradient."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    _count(received)
    return received


def add_over_ranks(rows: Tensor) -> Tensor:
    """All-reduce sum, in place."""
    if is_distributed():
        dist.all_reduce(rows)
        _count(rows, times=2)
    return rows


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        ctx.num_rows = len(rows)
        return gather_rows(rows.contiguous(), total)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        if not is_distributed():
            return grad, None
        grad = add_over_ranks(grad.contiguous())
        return grad[rank() :: world_size()][: ctx.num_rows].contiguous(), None


def gather_with_gradient(rows: Tensor, total: int) -> Tensor:
    """`gather_rows` with a gradient: that of the sum of all ranks' losses with respect to this rank's rows."""
    return _GatherWithGradient.apply(rows, total)
