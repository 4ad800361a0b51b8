"""A loss term in an installed package: the sum of absolute differences to the teacher's vector."""

from __future__ import annotations

from torch import Tensor

from distill.objectives.loss_terms import RowTerm, TermInputs


class L1(RowTerm):
    """sum over elements of |q_i - t_i|."""

    name = "l1"
    tasks = ("ckd",)

    def losses(self, inputs: TermInputs) -> Tensor:
        return (inputs.queries - inputs.targets).abs().sum(dim=1)
