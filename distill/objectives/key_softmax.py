"""A softmax over very many constant keys, in tiles, and the cross-entropy it gives.

With keys k_j that get no gradient, s_ij = q_i.k_j and p_i = softmax(a s_i), every loss of the form

    l_i = logsumexp_j(a s_ij) - a q_i.r_i        r_i a constant target in the keys' space

has the gradients  dl_i/dq_i = a (v_i - r_i)  and  dl_i/da = q_i.(v_i - r_i)  with  v_i = sum_j p_ij k_j.
So one pass over the keys that carries (log-sum-exp, v), as attention does with values = keys, gives value and gradient:
nothing of size B x N is ever held, and backward touches no key.

    hard labels (CKD)      r_i = the row's own key
    soft labels (ConGen)   r_i = sum_j softmax(t_i.k / tau_T)_j k_j, itself such a v

Two sets of keys that do not overlap are `joined` from their (log-sum-exp, v) alone, so that keys may lie on several ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEFAULT_TILE = 2048


def masked_pairs(
    query_ids: Tensor | None, key_ids: Tensor | None, positives: Tensor | None, start: int, stop: int
) -> tuple[Tensor, Tensor] | None:
    """The (row, key) pairs of keys[start:stop] that share a text hash and are not the row's own key.

    Found by sorting, so that the cost is that of the pairs there are and not of B x (stop - start) comparisons.
    """
    if query_ids is None or key_ids is None:
        return None
    sorted_ids, order = torch.sort(query_ids)
    tile_ids = key_ids[start:stop].contiguous()
    first = torch.searchsorted(sorted_ids, tile_ids)
    counts = torch.searchsorted(sorted_ids, tile_ids, right=True) - first
    columns = torch.repeat_interleave(torch.arange(stop - start, device=counts.device), counts)
    within = torch.arange(len(columns), device=counts.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rows = order[torch.repeat_interleave(first, counts) + within]
    if positives is not None:
        other = positives[rows] != columns + start
        rows, columns = rows[other], columns[other]
    return rows, columns


@torch.no_grad()
def attend(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    tile: int | None = None,
    positives: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    mask: Tensor | None = None,
    teacher: Tensor | None = None,
    same_meaning: float | None = None,
) -> tuple[Tensor, Tensor]:
    """logsumexp_j(scale_i q_i.k_j) [B] and v_i = sum_j softmax_j(scale_i q_i.k_j) k_j [B, d], tile by tile.

    queries [B, d], keys [N, d], scale (1,) or one a row [B]. Accumulates in float64 for float64 queries and in float32
    otherwise. Of no keys at all, or of masked ones only, the log-sum-exp is -inf and v is 0.

    The masks may cover only the first n <= B rows; the other rows see every key. query_ids [n], key_ids [N]: a key with the
    row's id is masked. teacher [n, d]: a key is masked if k_j.teacher_i is at least `same_meaning`. mask [n, N] bool.
    `positives[i]`, int64 [n], is never masked.
    """
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries_bd = queries.to(dtype) * scale.to(dtype).reshape(-1, 1)
    num_keys = len(keys)
    tile = min(tile or DEFAULT_TILE, max(num_keys, 1))
    running_max = torch.full((len(queries),), -torch.inf, dtype=dtype, device=queries.device)
    total = torch.zeros_like(running_max)
    weighted_bd = torch.zeros_like(queries_bd)
    buffer = torch.empty((len(queries), tile), dtype=dtype, device=queries.device)
    for start in range(0, num_keys, tile):
        stop = min(start + tile, num_keys)
        keys_td = keys[start:stop].to(dtype)
        logits_bt = buffer if stop - start == tile else buffer.new_empty((len(queries), stop - start))
        torch.mm(queries_bd, keys_td.T, out=logits_bt)
        dense = None if mask is None else mask[:, start:stop].clone()
        if teacher is not None and same_meaning is not None:
            alike = teacher.to(dtype) @ keys_td.T >= same_meaning
            dense = alike if dense is None else dense | alike
        if dense is not None:
            if positives is not None:
                own = (positives >= start) & (positives < stop)
                dense[own, positives[own] - start] = False
            logits_bt[: len(dense)].masked_fill_(dense, -torch.inf)
        pairs = masked_pairs(query_ids, key_ids, positives, start, stop)
        if pairs is not None:
            logits_bt[pairs] = -torch.inf
        new_max = torch.maximum(running_max, logits_bt.amax(dim=1))
        finite_max = torch.where(new_max == -torch.inf, 0.0, new_max)
        rescale = torch.exp(running_max - finite_max)
        weights_bt = logits_bt.sub_(finite_max[:, None]).exp_()
        total.mul_(rescale).add_(weights_bt.sum(dim=1))
        weighted_bd.mul_(rescale[:, None]).addmm_(weights_bt, keys_td)
        running_max = new_max
    return running_max + torch.log(total), weighted_bd / torch.where(total == 0, 1.0, total)[:, None]


@torch.no_grad()
def joined(lse: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` gives over all keys, from what it gave over P disjoint sets of them: lse [P, B], attended [P, B, d]."""
    whole = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - torch.where(whole == -torch.inf, 0.0, whole))
    return whole, (weights[:, :, None] * attended).sum(dim=0)


@torch.no_grad()
def survey_negatives(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    *,
    tile: int | None = None,
    teacher: Tensor | None = None,
    same_meaning: float | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row, its hardest negative and its number of masked keys, both [B] float32.

    Hardest negative: the largest q_i.k_j over keys that are neither row i's own nor of its text; -inf where there is none.
    Masked keys: those that `attend` masks for the row. positives: -1 where a row's own key is not among these keys.
    """
    tile = max(1, min(tile or DEFAULT_TILE, len(keys)))
    hardest = torch.full((len(queries),), -torch.inf, device=queries.device)
    masked = torch.zeros(len(queries), device=queries.device)
    rows = torch.arange(len(queries), device=queries.device)
    for start in range(0, len(keys), tile):
        stop = min(start + tile, len(keys))
        keys_td = keys[start:stop].float()
        cosines_bt = queries.float() @ keys_td.T
        pairs = masked_pairs(query_ids, key_ids, positives, start, stop)
        assert pairs is not None
        cosines_bt[pairs] = -torch.inf
        own = (positives >= start) & (positives < stop)
        own_pairs = rows[own], positives[own] - start
        cosines_bt[own_pairs] = -torch.inf
        hardest = torch.maximum(hardest, cosines_bt.amax(dim=1))
        if teacher is not None and same_meaning is not None:
            alike_bt = teacher.float() @ keys_td.T >= same_meaning
            alike_bt[pairs] = True
            alike_bt[own_pairs] = False
            masked += alike_bt.sum(dim=1)
        else:
            masked += torch.bincount(pairs[0], minlength=len(queries))
    return hardest, masked


class _CrossEntropy(torch.autograd.Function):
    """l_i = lse_i - a q_i.r_i with the gradients above; lse and v are constants that `attend` has computed."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, scale: Tensor, lse: Tensor, attended: Tensor, targets: Tensor) -> Tensor:
        queries_bd = queries.to(attended.dtype)
        difference_bd = attended - targets.to(attended.dtype)
        ctx.save_for_backward(queries, scale, difference_bd)
        return lse - scale.to(attended.dtype) * (queries_bd * targets.to(attended.dtype)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad_b,) = grad_outputs
        queries, scale, difference_bd = ctx.saved_tensors
        grad_queries = (grad_b * scale.to(grad_b.dtype))[:, None] * difference_bd
        grad_scale = (grad_b * (queries.to(grad_b.dtype) * difference_bd).sum(dim=1)).sum().reshape(scale.shape)
        return grad_queries.to(queries.dtype), grad_scale.to(scale.dtype), None, None, None


def cross_entropy(queries: Tensor, scale: Tensor, lse: Tensor, attended: Tensor, targets: Tensor) -> Tensor:
    """Per-row loss [B] from what `attend(queries, keys, scale)` returned; gradients reach queries [B, d] and scale (1,)."""
    return _CrossEntropy.apply(queries, scale, lse, attended, targets)
