"""cosine: the angle to the row's own teacher vector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill.objectives.loss_terms.base import RowTerm, TermInputs


def cosine_losses(queries: Tensor, teacher: Tensor) -> Tensor:
    """1 - queries_i . teacher_i of each row, [B]; both [B, d] L2-normalised. Half the squared distance between them."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return 1 - (queries.to(dtype) * teacher.to(dtype)).sum(dim=1)


class Cosine(RowTerm):
    """1 - q_i.t_i; with nested sizes, the mean over them of 1 - cos(z_i[:k], t_i[:k])."""

    name = "cosine"

    def losses(self, inputs: TermInputs) -> Tensor:
        if not inputs.nested:
            return cosine_losses(inputs.queries, inputs.targets)
        parts = [
            cosine_losses(normalize(inputs.vectors[:, :size], dim=-1), normalize(inputs.targets[:, :size], dim=-1))
            for size in inputs.nested
        ]
        return torch.stack(parts).mean(dim=0)
