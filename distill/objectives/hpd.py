"""Homomorphic projective distillation (arXiv 2203.07687): compact vectors that are the PCA of the teacher's.

    z_i = tanh(W s_i + b)      target_i = C t_i,  C [dim, d_t] the first components of the teacher's centred covariance
    L = mean over rows and elements of (z_i - target_i)^2

The components are applied without subtracting the mean, as in the paper. They are ordered, so the first 64 or 32 elements of
the target are themselves the best target of that size: nested sizes cost nothing more.
"""

from __future__ import annotations

from torch import Tensor


def hpd_losses(vectors: Tensor, targets: Tensor) -> Tensor:
    """Mean over elements of the squared difference of each row: vectors, targets [B, dim] -> [B]."""
    return (vectors - targets).square().mean(dim=1)
