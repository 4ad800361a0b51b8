"""Supervised contrast (SimCSE, DistilCSE stage 2): anchors against the positives and hard negatives of all ranks.

L = -mean_i log( exp(a h_i.h_i+) / sum_j [ exp(a h_i.h_j+) + exp(a h_i.h_j-) ] )        a = 1 / tau
"""

from __future__ import annotations

import torch
from torch import Tensor


def triplet_losses(
    anchors: Tensor, positives: Tensor, negatives: Tensor, rows: Tensor, *, scale: Tensor, mask: Tensor
) -> Tensor:
    """The loss of each anchor, [B]; gradients reach all inputs.

    anchors [B, d]; positives, negatives [G, d], L2-normalised; rows [B] int64: each anchor's own positive. scale (1,).
    mask [B, 2G] bool: candidates, positives before negatives, that are no negatives of the row.
    """
    logits_bk = scale * (anchors @ torch.cat([positives, negatives]).T)
    return torch.nn.functional.cross_entropy(logits_bk.masked_fill(mask, -torch.inf), rows, reduction="none")
