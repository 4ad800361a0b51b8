"""pca: homomorphic projective distillation (arXiv 2203.07687): compact vectors that are the PCA of the teacher's.

    z_i = tanh(W s_i + b)      target_i = C t_i,  C [dim, d_t] the first components of the teacher's centred covariance
    L = mean over rows and elements of (z_i - target_i)^2

The components are applied without subtracting the mean, as in the paper. They are ordered, so that the first 64 or 32 elements
of the target are themselves the best target of that size: nested sizes cost nothing more.
"""

from __future__ import annotations

from torch import Tensor

from distill.objectives.loss_terms.base import RowTerm, TermInputs


def pca_losses(vectors: Tensor, targets: Tensor) -> Tensor:
    """The mean over elements of the squared difference of each row: vectors, targets [B, dim] -> [B]."""
    return (vectors - targets).square().mean(dim=1)


class Pca(RowTerm):
    """mean over elements of (z_i - C t_i)^2."""

    name = "pca"
    tasks = ("hpd",)
    order = -1

    def losses(self, inputs: TermInputs) -> Tensor:
        return pca_losses(inputs.vectors, inputs.targets)
