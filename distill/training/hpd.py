"""The HPD stage: a compact head on the student, trained towards the PCA of the teacher's vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from distill.objectives.hpd import hpd_losses
from distill.student import Student
from distill.training.batches import MicroBatch, ShardBatches
from distill.training.projection import ridge_regression, set_linear
from distill.training.recipe import Task


def fit_head(student: Student, sentences: list[str], targets: np.ndarray) -> None:
    """Sets the head to the ridge regression of `targets` [n, dim] on the student's vectors, which training then refines."""
    head = student.head
    assert head is not None
    student.head = None
    vectors = student.encode(sentences, normalize=False).astype(np.float64)
    student.head = head
    wanted = np.arctanh(targets.clip(-0.999, 0.999)) if len(head) > 1 else targets
    linear = head[0]
    assert isinstance(linear, nn.Linear)
    set_linear(linear, *ridge_regression(vectors, wanted))


class HpdTask(Task):
    """The student with its head; forward is the summed loss of b rows. components [dim, d_t]: of the teacher's PCA."""

    def __init__(self, student: Student, components: Tensor, amp: torch.dtype | None, *, freeze_encoder: bool) -> None:
        super().__init__()
        self.student = student
        self.components = components
        self.amp = amp
        if freeze_encoder:
            student.encoder.requires_grad_(False)

    def forward(self, micro: MicroBatch, shared: None) -> tuple[Tensor, dict[str, Tensor]]:
        compact_bd = self.embed(micro)
        if len(micro.positions) == 0:
            return compact_bd.sum() * 0, {}
        targets_bd = micro.teacher.float() @ self.components.T.to(micro.teacher.device)
        loss_b = hpd_losses(compact_bd, targets_bd)
        cosine_b = nn.functional.cosine_similarity(compact_bd.detach(), targets_bd)
        return loss_b.sum(), {"loss/hpd": loss_b.detach().sum(), "similarity/positive": cosine_b.sum()}


class HpdRecipe:
    """Rows stand alone: nothing is gathered, nothing lives between steps."""

    def __init__(self, task: HpdTask, batches: ShardBatches) -> None:
        self.task = task
        self.student = task.student
        self.num_micro = batches.num_micro
        self.steps_per_epoch = batches.order.steps_per_epoch
        self.load = batches

    def restore(self, step: int) -> None:
        pass

    def share(self, step: int, micro: list[MicroBatch]) -> None:
        pass

    def taken(self) -> None:
        pass
