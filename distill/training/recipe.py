"""What differs between stages; `loop.py` is the same for all."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.student import Student
from distill.training.batches import MicroBatch


class Task(nn.Module):
    """A stage's parameters, all of them, in one module whose forward is the loss.

    task(micro, shared) returns the sum over the micro-batch's rows of their losses, and sums of what is logged. `measuring` is
    True on steps that are logged: what is dear to measure is measured then, a value a row, and lies in `observed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observed = {}

    measuring = False
    observed: dict[str, list[Tensor]]
    amp: torch.dtype | None = None
    student: Student

    def embed(self, micro: MicroBatch) -> Tensor:
        """The student's vectors of a micro-batch, [b, dim] float32, chunk by chunk under one autocast."""
        device = micro.positions.device.type
        with torch.autocast(device, dtype=self.amp, enabled=self.amp is not None):
            return self.student(*micro.tokens).float()

    def observe(self, rows: dict[str, Tensor]) -> None:
        """Keeps values of this rank's rows, [b] each by name; ranks observe the same names."""
        for name, values_b in rows.items():
            self.observed.setdefault(name, []).append(values_b.detach().flatten())

    def take_observed(self) -> dict[str, Tensor]:
        """What was observed since the last call: all rows of this rank, by name."""
        taken, self.observed = self.observed, {}
        return {name: torch.cat(parts) for name, parts in taken.items()}


class Recipe(Protocol):
    """A stage's module and data."""

    @property
    def task(self) -> Task: ...

    @property
    def student(self) -> Student: ...

    @property
    def num_micro(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def load(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step; called in a background thread."""
        ...

    def restore(self, step: int) -> None:
        """Brings back what lives between steps, as it was before `step`."""
        ...

    def share(self, step: int, micro: list[MicroBatch]) -> Any:
        """What all micro-batches of a step see; may be a collective."""
        ...

    def taken(self) -> None:
        """Called once the optimiser has stepped."""
        ...

    def floor(self, means: dict[str, float]) -> dict[str, float]:
        """What the loss is held against (floors.py), from the means of a measured step."""
        ...

    def state(self, step: int) -> dict[str, float]:
        """What there is to say of what lives between steps, as step `step` saw it."""
        ...
