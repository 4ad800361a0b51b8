"""Contrast of students with each other (SimCSE; DistilCSE stage 2): anchors against the candidates of all ranks.

    L = -mean_i log( exp(a h_i.h_i+) / sum_j exp(a h_i.c_j) )        a = 1 / tau,  c_j: the candidates of the global batch

supervised      candidates are the positives h_j+ and the hard negatives h_j- of all triplets
unsupervised    h_i and h_i+ are one text under two dropout masks, and candidates are the h_j+ alone
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contrast_losses(anchors: Tensor, candidates: Tensor, rows: Tensor, *, scale: Tensor, mask: Tensor) -> Tensor:
    """The loss of each anchor, [B]; gradients reach anchors, candidates and scale.

    anchors [B, d], candidates [N, d], L2-normalised; rows [B] int64: each anchor's own positive among them. scale (1,).
    mask [B, N] bool: candidates that are no negatives of the row.
    """
    logits_bn = scale * (anchors @ candidates.T)
    return torch.nn.functional.cross_entropy(logits_bn.masked_fill(mask, -torch.inf), rows, reduction="none")


def same_text(own_bv: Tensor, all_gv: Tensor, positions_b: Tensor) -> Tensor:
    """[B, (V-1) G] bool: candidates that are the very text of the row's anchor or of its positive.

    own_bv [B, V], all_gv [G, V] int64: text hashes of anchor, positive and, for V = 3, hard negative; candidates are the
    columns of all_gv after the first, one below the other. A row's own positive and own hard negative stay.
    """
    candidates = all_gv[:, 1:].T.flatten()
    mask = (candidates == own_bv[:, :1]) | (candidates == own_bv[:, 1:2])
    rows = torch.arange(len(own_bv), device=mask.device)
    for column in range(all_gv.shape[1] - 1):
        mask[rows, positions_b + column * len(all_gv)] = False
    return mask


def reference_loss(scale: float, num_candidates: int) -> float:
    """log(1 + (N-1) exp(-2a)): a positive at cosine 1 and all N-1 negatives at -1. No student goes below it, but where
    negatives are masked."""
    return math.log1p((num_candidates - 1) * math.exp(-2 * scale))
