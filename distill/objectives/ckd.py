"""Contrastive knowledge distillation (DistilCSE, arXiv 2112.05638): student queries against constant teacher keys.

    L = -mean_i log( exp(a q_i.t_i) / sum_k exp(a q_i.k) )       q_i = norm(P(s_i)),  a = exp(logit_scale)

keys: the teacher's vectors of the global batch and of a queue of past ones. They get no gradient, so that every row's loss
stands alone: micro-batches that see the same keys add up to the large batch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.objectives.key_softmax import attend, cross_entropy


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
    attention: tuple[Tensor, Tensor] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """-mean_i log softmax(scale * queries_i . keys)[positives_i], never holding B x N.

    queries [B, d] and keys [N, d] L2-normalised, any float dtype; keys get no gradient. positives [B] int64: each row's own
    key. scale: exp(logit_scale), shape (1,). query_ids [B] and key_ids [N], int64 text hashes: a key with the row's id is no
    negative. mask [B, N] bool, True = not a negative. same_meaning: a key whose cosine to the row's own key is at least this is
    no negative either. positives[i] always stays. tile: keys held at a time. attention: what `key_softmax.attend` gives for
    these queries over a larger set of keys (a queue, other ranks' keys); `keys` then holds the positives alone.
    Returns a scalar, or [B] for reduction "none", accumulated in float32 (float64 for float64 queries). Raises ValueError on
    shapes that do not fit.
    """
    _check(queries, keys, positives, query_ids, key_ids, mask)
    own = keys[positives]
    lse, attended = attention or attend(
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
    losses = cross_entropy(queries, scale, lse, attended, own)
    return losses.mean() if reduction == "mean" else losses


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
