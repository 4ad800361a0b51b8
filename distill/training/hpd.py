"""The HPD stage: a compact head on the student, trained towards the PCA of the teacher's vectors.

It is the CKD stage in another space: where that one projects the student's vectors to the teacher's width, this one brings the
teacher's to the student's. So the contrastive terms, the queue (of compact vectors) and what is gathered are the same.

The relational term alone holds students against each other, those of the whole global batch however it is dealt. With one
micro-batch a rank they are gathered in forward; with several, gradients are cached as in contrast.py.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import HpdConfig
from distill.objectives.ckd import cosine_losses
from distill.objectives.hpd import hpd_losses
from distill.objectives.relational import relational_losses, whitening_map
from distill.shards import ShardReader
from distill.student import Student
from distill.training.batches import MicroBatch
from distill.training.ckd import CkdRecipe, CkdTask
from distill.training.distributed import add_over_ranks, gather_dealt_rows, gather_with_gradient
from distill.training.keys import Keys
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


def whitening_of(config: HpdConfig, reader: ShardReader) -> Tensor | None:
    """float32 [d_t, d_t], from the moments of all teacher vectors; None where the relational term takes them as they are."""
    if not config.whitening:
        return None
    components, eigenvalues = map(torch.from_numpy, reader.moments.pca(reader.dim))
    return whitening_map(components, eigenvalues, config.whitening).float()


class Relation(NamedTuple):
    """What the first pass leaves for a micro-batch: the relational losses of its rows and the entropies of their labels, [b];
    and the gradient of all rows' relational losses at its vectors, [b, dim]."""

    losses: Tensor
    floors: Tensor
    gradients: Tensor


class HpdTask(CkdTask):
    """L = sum_i [ w_pca mean((z_i - C t_i)^2) + w_cosine mean_k (1 - cos(z_i[:k], (C t_i)[:k])) + w_relational R_i
                   + w_ckd CKD_i + w_congen ConGen_i ]

    z_i [dim]: the student with its head. C [dim, d_t]: the components of the teacher's PCA. k: dim and the nested sizes.
    whitening: a map [d_t, d_t] of the teacher's vectors before R_i is taken (relational.whitening_map).
    """

    def __init__(
        self,
        student: Student,
        components: Tensor,
        config: HpdConfig,
        amp: torch.dtype | None,
        *,
        whitening: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, None, config, amp, seed=seed)
        self.components = components
        self.whitening = whitening
        self.sizes = [config.dim, *config.nested]
        self.relations: deque[Relation] = deque()
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
        if "relational" in self.weights:
            losses["relational"] = self._relational_losses(vectors_bd, micro)
        return losses

    def _relational_losses(self, vectors_bd: Tensor, micro: MicroBatch) -> Tensor:
        if self.relations:
            relation = self.relations.popleft()
            surrogate_b = (vectors_bd * relation.gradients).sum(dim=1)  # its gradient is the cached one, its value the loss's
            losses_b, floors_b = surrogate_b - surrogate_b.detach() + relation.losses, relation.floors
        else:
            dealt = micro.positions.argsort()
            vectors_gd = gather_with_gradient(vectors_bd[dealt], self.config.global_batch)
            teacher_gd = gather_dealt_rows(micro.teacher[dealt], self.config.global_batch)
            losses_b, floors_b = self.relational(vectors_gd, teacher_gd, micro.positions)
        if self.measuring:
            self.observe({"floor/relational": floors_b})
        return losses_b

    def relational(self, vectors_gd: Tensor, teacher_gd: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        temperatures = {name: getattr(self.config, name) for name in ("student_temperature", "teacher_temperature")}
        if self.whitening is not None:
            teacher_gd = nn.functional.normalize(teacher_gd.float() @ self.whitening.T.to(teacher_gd.device), dim=-1)
        return relational_losses(vectors_gd, teacher_gd, rows, sizes=self.sizes, **temperatures)

    def _targets(self, teacher: Tensor) -> Tensor:
        return teacher.float() @ self.components.T.to(teacher.device)


class HpdRecipe(CkdRecipe):
    task: HpdTask

    def share(self, step: int, micro: list[MicroBatch]) -> Keys | None:
        if "relational" in self.task.weights and len(micro) > 1:
            self.task.relations = relate(self.task, micro)
        return super().share(step, micro)


def relate(task: HpdTask, micro: list[MicroBatch]) -> deque[Relation]:
    """The first pass of a step with several micro-batches; a collective, with the same calls on every rank."""
    total = task.config.global_batch
    dealt = torch.cat([part.positions for part in micro]).argsort()
    with torch.no_grad():
        own = torch.cat([task.embed(part)[: len(part.positions)] for part in micro])
    vectors_gd = gather_dealt_rows(own[dealt], total).requires_grad_()
    teacher_gd = gather_dealt_rows(torch.cat([part.teacher for part in micro])[dealt], total)
    asked_gd = torch.zeros_like(vectors_gd)
    found: list[tuple[Tensor, Tensor]] = []
    for part in micro:
        losses_b, floors_b = task.relational(vectors_gd, teacher_gd, part.positions)
        asked_gd += torch.autograd.grad(losses_b.sum(), vectors_gd)[0]
        found.append((losses_b.detach(), floors_b))
    asked_of_all = add_over_ranks(asked_gd)
    return deque(Relation(*of_rows, asked_of_all[part.positions]) for part, of_rows in zip(micro, found, strict=True))


def _cosine_losses(vectors: Tensor, targets: Tensor) -> Tensor:
    normalize = nn.functional.normalize
    return cosine_losses(normalize(vectors, dim=-1), normalize(targets, dim=-1))
