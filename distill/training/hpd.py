"""The HPD stage: a compact head on the student, trained towards the PCA of the teacher's vectors.

It is the CKD stage in another space: where that one projects the student's vectors to the teacher's width, this one brings the
teacher's to the student's. So the contrastive terms, the queue (of compact vectors) and what is gathered are the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import HpdConfig
from distill.objectives.ckd import cosine_losses
from distill.objectives.hpd import hpd_losses
from distill.student import Student
from distill.training.batches import MicroBatch
from distill.training.ckd import CkdTask
from distill.training.projection import ridge_regression, set_linear

LinearMap = tuple[np.ndarray, np.ndarray]


def fit_head(student: Student, sentences: list[str], targets: np.ndarray, *, known: LinearMap | None = None) -> None:
    """Sets the head near `targets` [n, dim], which training then refines.

    known: (weight [dim, d_s], bias [dim]), the way from the student's vectors to the targets' directions if an earlier stage
    has learned one, taken with the factor that brings it nearest; else the ridge regression on the student's vectors.
    """
    head = student.head
    assert head is not None
    student.head = None
    vectors = student.encode(sentences, normalize=False).astype(np.float64)
    student.head = head
    wanted = np.arctanh(targets.clip(-0.999, 0.999)) if len(head) > 1 else targets
    if known is None:
        weight, bias = ridge_regression(vectors, wanted)
    else:
        reached = vectors @ known[0].T + known[1]
        factor = np.vdot(reached, wanted) / np.vdot(reached, reached)
        weight, bias = factor * known[0], factor * known[1]
    linear = head[0]
    assert isinstance(linear, nn.Linear)
    set_linear(linear, weight, bias)


class HpdTask(CkdTask):
    """L = sum_i [ w_pca mean((z_i - C t_i)^2) + w_cosine mean_k (1 - cos(z_i[:k], (C t_i)[:k])) + w_ckd CKD_i + w_congen CG_i ]

    z_i [dim]: the student with its head. C [dim, d_t]: the components of the teacher's PCA. k: dim and the nested sizes.
    """

    def __init__(
        self, student: Student, components: Tensor, config: HpdConfig, amp: torch.dtype | None, *, seed: int = 0
    ) -> None:
        super().__init__(student, None, config, amp, seed=seed)
        self.components = components
        self.sizes = [config.dim, *config.nested]
        if config.freeze_encoder:
            student.encoder.requires_grad_(False)

    @property
    def key_width(self) -> int:
        return len(self.components)

    def as_keys(self, teacher: Tensor) -> Tensor:
        return nn.functional.normalize(self._targets(teacher), dim=-1).to(torch.float16)

    def own_losses(self, vectors_bd: Tensor, queries_bd: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
        targets_bd = self._targets(micro.teacher)
        losses: dict[str, Tensor] = {}
        if "pca" in self.weights:
            losses["pca"] = hpd_losses(vectors_bd, targets_bd)
        if "cosine" in self.weights:
            parts = [_cosine_losses(vectors_bd[:, :size], targets_bd[:, :size]) for size in self.sizes]
            losses["cosine"] = torch.stack(parts).mean(dim=0)
        return losses

    def _targets(self, teacher: Tensor) -> Tensor:
        return teacher.float() @ self.components.T.to(teacher.device)


def _cosine_losses(vectors: Tensor, targets: Tensor) -> Tensor:
    normalize = nn.functional.normalize
    return cosine_losses(normalize(vectors, dim=-1), normalize(targets, dim=-1))
