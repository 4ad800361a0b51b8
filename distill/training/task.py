"""What differs between training tasks; `loop.py` is the same for all.

A task is one file of training/tasks/ (or of an installed package): its config section, its module, the data of a step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.objectives.scale import LOWEST_SCALE
from distill.student import Student
from distill.training.batches import MicroBatch
from distill.training.keys import Keys
from distill.training.train_config import TemperatureConfig


@dataclass
class StepContext:
    """What all micro-batches of one step share, from `Task.prepare_step` to `Task.after_step`.

    is_logged: whether the step is logged; what is expensive to measure is measured then, and lies in `observed`, a value a row.
    keys: teacher keys, where the loss needs any. first_pass: what a first forward pass left for each micro-batch, by its index.
    source_names: of the sources of the rows, where there are several.
    """

    step: int
    is_logged: bool = False
    keys: Keys | None = None
    first_pass: Sequence[Any] = ()
    observed: dict[str, list[Tensor]] = field(default_factory=dict)
    source_names: Sequence[str] = ()

    def observe(self, rows: dict[str, Tensor]) -> None:
        """Keeps values of this rank's rows, [b] each by name; ranks observe the same names."""
        for name, values_b in rows.items():
            self.observed.setdefault(name, []).append(values_b.detach().flatten())

    def observe_sources(self, sources_b: Tensor | None, losses_b: Tensor) -> None:
        """Keeps the number and the summed loss of this rank's rows of each source, where there are several.

        sources_b: the number of each row's source, on all ranks or on none.
        """
        if sources_b is None:
            return
        size = len(self.source_names)
        counts = torch.bincount(sources_b, minlength=size)
        sums = losses_b.new_zeros(size, dtype=torch.double).index_add_(0, sources_b, losses_b.detach().double())
        for name, count, loss in zip(self.source_names, counts, sums, strict=True):
            self.observe({f"source_texts/{name}": count, f"source_loss/{name}": loss})

    def observations(self) -> dict[str, Tensor]:
        """All observed rows of this rank, by name."""
        return {name: torch.cat(parts) for name, parts in self.observed.items()}


class Temperature(nn.Module):
    """exp(logit_scale), never above `max_scale`; the clamp passes the gradient, so that it can come down again.

    Begins at the config's scale, or at LOWEST_SCALE until `set_scale` is called.
    """

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        # shape (1,): DeepSpeed cannot partition a parameter without dimensions
        self.logit_scale = nn.Parameter(torch.zeros(1), requires_grad=config.learnable)
        self.set_scale(min(LOWEST_SCALE, config.max_scale) if config.scale is None else config.scale)
        self.log_max = math.log(config.max_scale)

    def set_scale(self, scale: float) -> None:
        nn.init.constant_(self.logit_scale, math.log(scale))

    def forward(self) -> Tensor:
        above = (self.logit_scale - self.log_max).clamp(min=0).detach()
        return (self.logit_scale - above).exp()


class TrainingModule(nn.Module):
    """A task's parameters, all of them, in one module whose forward is the loss, so that ZeRO-3 gathers them.

    module(micro, context) returns the sum over the micro-batch's rows of their losses, and sums over rows of what is logged.
    """

    student: Student
    amp: torch.dtype | None = None

    def embed(self, micro: MicroBatch) -> Tensor:
        """The student's vectors of a micro-batch, [b, dim] float32, chunk by chunk under one autocast."""
        device = micro.positions.device.type
        with torch.autocast(device, dtype=self.amp, enabled=self.amp is not None):
            return self.student(*micro.tokens).float()

    @abstractmethod
    def forward(self, micro: MicroBatch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]: ...


class Task(ABC):
    """A task's module and data on this rank, as the training loop uses them.

    num_micro: micro-batches of a step, the same on every rank; steps whose number differs are taken as they are loaded.
    steps_per_epoch: global batches of an epoch.
    """

    module: TrainingModule
    depends_on_ranks = False  # whether another number of ranks trains another student, beyond rounding
    num_micro: int
    steps_per_epoch: int

    @abstractmethod
    def load(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step; called in a background thread."""

    def restore(self, step: int) -> None:
        """Restores what lives between steps to what it was before `step`; nothing, by default."""
        return

    def prepare_step(self, step: int, micro: list[MicroBatch], *, is_logged: bool) -> StepContext:
        """What all micro-batches of a step share; may be a collective."""
        return StepContext(step, is_logged)

    def after_step(self, context: StepContext) -> None:
        """Called once the optimizer has stepped; does nothing, by default."""
        return

    def reference_losses(self, means: dict[str, float]) -> dict[str, float]:
        """What the loss is compared with, from the means of a logged step: "reference_loss", and one for each term."""
        return {}

    def step_metrics(self, step: int) -> dict[str, float]:
        """Metrics of what lives between steps, as step `step` saw it."""
        return {}
