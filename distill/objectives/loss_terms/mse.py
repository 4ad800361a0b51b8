"""mse: the squared distance to the row's own teacher vector."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.loss_terms.base import RowTerm, TermInputs


def mse_losses(projected: Tensor, teacher: Tensor) -> Tensor:
    """|p_i - t_i|^2 of each row, [B]: summed over elements, so that between unit vectors it is twice `cosine_losses`."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    return (projected.to(dtype) - teacher.to(dtype)).square().sum(dim=1)


class Mse(RowTerm):
    """|P(s_i) - t_i|^2; the student's vector is not normalised."""

    name = "mse"
    tasks = ("ckd",)

    def losses(self, inputs: TermInputs) -> Tensor:
        return mse_losses(inputs.vectors, inputs.targets)
