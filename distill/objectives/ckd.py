"""Contrastive knowledge distillation: student queries against constant teacher keys.

    q_i = norm(P(s_i))    keys = [teacher vectors of the global batch ; queue]    a = exp(logit_scale)
    CKD      L = -mean_i log( exp(a q_i.t_i) / sum_k exp(a q_i.k) )                          arXiv 2112.05638
    ConGen   L = mean_i CE( softmax(t_i.keys / tau_T), softmax(q_i.keys / tau_S) )           EMNLP Findings 2022
    cosine   L = mean_i (1 - q_i.t_i)
    MSE      L = mean_i |P(s_i) - t_i|^2                                                     not normalised

Keys are constants, so every row's loss stands alone: micro-batches that see the same keys add up to the large batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.contrast import attend, cross_entropy

NUM_GROUPS = 10
SHUFFLED_AT_ONCE = 1 << 22  # similarities


def ckd_loss(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    *,
    scale: Tensor,
    tile: int | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    mask: Tensor | None = None,
    same_meaning: float | None = None,
) -> Tensor:
    """-mean_i log softmax(scale * queries_i . keys)[positives_i], never holding B x N.

    queries [B, d] and keys [N, d] L2-normalised, any float dtype; keys get no gradient. positives [B] int64: each row's own
    key. scale: exp(logit_scale), shape (1,). query_ids [B] and key_ids [N], int64 text hashes: a key with the row's id is no
    negative. mask [B, N] bool, True = not a negative. same_meaning: nor is a key whose cosine to the row's own key is at least
    this. positives[i] always stays. tile: keys held at a time.
    Returns a scalar, accumulated in float32 (float64 for float64 queries). Raises ValueError on shapes that do not fit.
    """
    _check(queries, keys, positives, query_ids, key_ids, mask)
    own = keys[positives]
    lse, attended = attend(
        queries.detach(),
        keys,
        scale.detach(),
        tile=tile,
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        mask=mask,
        teacher=own if same_meaning is not None else None,
        same_meaning=same_meaning,
    )
    return cross_entropy(queries, scale, lse, attended, own).mean()


def cosine_losses(queries: Tensor, teacher: Tensor) -> Tensor:
    """1 - queries_i . teacher_i of each row, [B]; both [B, d] L2-normalised. Half the squared distance between them."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return 1 - (queries.to(dtype) * teacher.to(dtype)).sum(dim=1)


def mse_losses(projected: Tensor, teacher: Tensor) -> Tensor:
    """|p_i - t_i|^2 of each row, [B]: summed over elements, so that between unit vectors it is twice `cosine_losses`."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    return (projected.to(dtype) - teacher.to(dtype)).square().sum(dim=1)


@torch.no_grad()
def shuffled_targets(teacher: Tensor, keys: Tensor, seeds: list[int], *, teacher_temperature: float) -> Tensor:
    """ConGen's target of each row under Group-P shuffling (DistillCSE, arXiv 2310.13499), [B, d] float32.

    A row's probabilities softmax(t_i.keys / tau_T), in falling order, are cut into groups at every tenth of their sum, and
    shuffled inside each: the student learns which keys are near, and not the teacher's order among equals. seeds: one a row,
    which alone decides its shuffle. Rows are taken a few at a time, so that B x N is never held.
    """
    keys = keys.to(torch.float32)
    rows_a_time = max(1, SHUFFLED_AT_ONCE // len(keys))
    targets_bd = keys.new_empty((len(teacher), keys.shape[1]))
    for start in range(0, len(teacher), rows_a_time):
        rows = slice(start, start + rows_a_time)
        weights_rn = torch.softmax(teacher[rows].to(torch.float32) @ keys.T / teacher_temperature, dim=1)
        falling_rn, order_rn = weights_rn.sort(dim=1, descending=True)
        group_rn = ((falling_rn.cumsum(dim=1) - falling_rn) * NUM_GROUPS).floor().clamp(0, NUM_GROUPS - 1)
        draws = [torch.Generator(keys.device).manual_seed(seed) for seed in seeds[rows]]
        noise_rn = torch.stack([torch.rand(len(keys), generator=draw, device=keys.device) for draw in draws])
        inside_rn = (group_rn + noise_rn).argsort(dim=1)
        weights_rn.scatter_(1, order_rn, falling_rn.gather(1, inside_rn))
        targets_bd[rows] = weights_rn @ keys
    return targets_bd


def _check(
    queries: Tensor, keys: Tensor, positives: Tensor, query_ids: Tensor | None, key_ids: Tensor | None, mask: Tensor | None
) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be [B, d] and [N, d]")
    if positives.shape != queries.shape[:1]:
        raise ValueError(f"positives {tuple(positives.shape)} must hold one key index for each of {len(queries)} queries")
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids and key_ids come together: an id for every row and for every key")
    if query_ids is not None and key_ids is not None and (len(query_ids) != len(queries) or len(key_ids) != len(keys)):
        raise ValueError(f"ids [{len(query_ids)}] and [{len(key_ids)}] for {len(queries)} queries and {len(keys)} keys")
    if mask is not None and mask.shape != (len(queries), len(keys)):
        raise ValueError(f"mask {tuple(mask.shape)} must be [{len(queries)}, {len(keys)}]")
