"""How good the student is right now: fidelity to the teacher on held-out text and, where there is data, STS-B dev.

All ranks encode their share with the same number of batches, since under ZeRO-3 every forward pass is a collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from distill.evaluation import dev_score, fidelity
from distill.evaluation.sts import Pairs
from distill.shards import ShardReader
from distill.student import Student
from distill.training.distributed import gather_dealt_rows, rank, world_size

SMALLEST_DEV = 20


def split_held_out(num_held_out: int, wanted_test: int, wanted_dev: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the held-out set for the test and for dev evaluations; apart from each other where there are enough.

    The held-out set is ordered by text hash, so both are random samples. Too small a set serves both.
    """
    test = np.arange(min(wanted_test, num_held_out))
    dev = np.arange(len(test), min(num_held_out, len(test) + wanted_dev))
    return test, dev if len(dev) >= SMALLEST_DEV else test[:wanted_dev]


class Dev:
    """The dev evaluation of one stage. held_out: the shard set of held-out sentences; sts: STS-B's dev set, or None.

    teacher_line: what the teacher itself reaches, by tag, where it is known.
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
        self.sentences = held_out.texts(rows)
        self.teacher = held_out.vectors(rows).astype(np.float32)
        self.sts = sts
        self.batch_size = batch_size
        self.amp = amp
        self.teacher_line = {"teacher/fidelity": 1.0}
        if sts is not None and teacher_sts is not None:
            self.teacher_line["teacher/sts/STSB-dev"] = teacher_sts

    def __call__(self, student: Student) -> dict[str, float]:
        """Figures by name, the same on every rank; a collective."""
        was_training = student.training
        student.eval()
        figures = {f"fidelity/{k}": v for k, v in fidelity(self._encode(student, self.sentences), self.teacher).items()}
        if self.sts is not None:
            figures["sts/STSB-dev"] = dev_score(lambda sentences: self._encode(student, sentences), self.sts)
        student.train(was_training)
        return figures

    @torch.no_grad()
    def _encode(self, student: Student, sentences: Sequence[str]) -> np.ndarray:
        order = np.array(sorted(range(len(sentences)), key=lambda i: (-len(sentences[i]), i)))
        device = next(student.parameters()).device
        mine = order[rank() :: world_size()]
        largest = -(-len(order) // world_size())
        parts = []
        for start in range(0, largest, self.batch_size):
            batch = [sentences[i] for i in mine[start : start + self.batch_size]]
            tokens = {name: value.to(device) for name, value in student.tokenize(batch or ["."]).items()}
            with torch.autocast(device.type, dtype=self.amp, enabled=self.amp is not None):
                vectors = nn.functional.normalize(student(tokens).float(), dim=-1)
            parts.append(vectors[: len(batch)])
        gathered = gather_dealt_rows(torch.cat(parts), len(order)).cpu().numpy()
        restored = np.empty_like(gathered)
        restored[order] = gathered
        return restored


def score(figures: dict[str, float], *, by_sts: bool) -> float:
    """What decides which student is best: the mean of the fidelity figures; STS-B dev for fine-tuning, where it is known."""
    if by_sts and "sts/STSB-dev" in figures:
        return figures["sts/STSB-dev"] / 100
    return float(np.mean([value for name, value in figures.items() if name.startswith("fidelity/")]))
