"""Dev evaluation of the student in training: fidelity to the teacher on held-out text and, where there is data, STS-B dev.

All ranks encode their part with the same number of batches, since under ZeRO-3 every forward pass is a collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from distill.metrics.fidelity import SMALLEST, fidelity, rows_by_role
from distill.metrics.sts import Pairs, dev_score
from distill.run.collectives import gather_rows, rank, world_size
from distill.run.prompts import Role
from distill.shards import ShardReader
from distill.student import Student
from distill.training.batches import PLACEHOLDER


class DevEvaluation:
    """The dev evaluation of one stage. held_out: the shard set of held-out texts; sts: STS-B's dev set, or None.

    teacher_scores: the teacher's own, by TensorBoard tag, where they are known.
    """

    def __init__(
        self,
        held_out: ShardReader,
        rows: np.ndarray,
        sts: Pairs | None,
        *,
        batch_size: int,
        amp: torch.dtype | None,
        teacher_sts: float | None = None,
    ) -> None:
        self.texts, self.roles = held_out.texts(rows), held_out.roles(rows)
        self.translations = held_out.translations(rows)
        self.teacher = held_out.vectors(rows).astype(np.float32)
        self.sts = sts
        self.batch_size = batch_size
        self.amp = amp
        self.teacher_scores = {"teacher/fidelity": 1.0}
        if sts is not None and teacher_sts is not None:
            self.teacher_scores["teacher/sts/STSB-dev"] = teacher_sts

    def __call__(self, student: Student) -> dict[str, float]:
        """Metrics by name, the same on every rank; a collective."""
        was_training = student.training
        student.eval()
        vectors = self._encode(student, self.texts, self.roles)
        metrics = {f"fidelity/{k}": v for k, v in fidelity(vectors, self.teacher).items()}
        for role, rows in rows_by_role(self.roles).items():
            metrics |= {f"fidelity_{role}/{k}": v for k, v in fidelity(vectors[rows], self.teacher[rows]).items()}
        for column, (rows, texts) in self.translations.items():
            if len(rows) >= SMALLEST:
                translated = self._encode(student, texts, [self.roles[row] for row in rows])
                metrics |= {f"fidelity_{column}/{k}": v for k, v in fidelity(translated, self.teacher[rows]).items()}
        if self.sts is not None:
            metrics["sts/STSB-dev"] = dev_score(lambda texts: self._encode(student, texts, [None] * len(texts)), self.sts)
        student.train(was_training)
        return metrics

    @torch.no_grad()
    def _encode(self, student: Student, texts: Sequence[str], roles: Sequence[Role | None]) -> np.ndarray:
        order = np.array(sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i)))
        device = next(student.parameters()).device
        mine = order[rank() :: world_size()]
        largest = -(-len(order) // world_size())
        parts = []
        for start in range(0, largest, self.batch_size):
            rows = mine[start : start + self.batch_size].tolist()
            # a rank without a row left still joins the forward pass
            read = student.tokenize([texts[row] for row in rows] or [PLACEHOLDER], [roles[row] for row in rows] or None)
            tokens = {name: value.to(device) for name, value in read.items()}
            with torch.autocast(device.type, dtype=self.amp, enabled=self.amp is not None):
                vectors = nn.functional.normalize(student(tokens).float(), dim=-1)
            parts.append(vectors[: len(rows)])
        gathered = gather_rows(torch.cat(parts), len(order)).cpu().numpy()
        restored = np.empty_like(gathered)
        restored[order] = gathered
        return restored
