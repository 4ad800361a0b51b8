"""What differs between stages; `loop.py` is the same for all."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from distill.student import Student
from distill.training.batches import MicroBatch


class Recipe(Protocol):
    """A stage's module and data.

    task(micro, shared) returns the sum over the micro-batch's rows of their losses, and sums of what is logged.
    """

    @property
    def task(self) -> nn.Module: ...

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
