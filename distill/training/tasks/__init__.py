"""The training tasks, one file each: found in this folder, or by the entry-point group "distill.tasks" (name = class)."""

from __future__ import annotations

from distill.run.registry import find_entries
from distill.training.training_stage import TrainingStage


def training_tasks() -> dict[str, type[TrainingStage]]:
    """All tasks by name, built-in and installed ones."""
    return find_entries("distill.training.tasks", "distill.tasks", TrainingStage)  # type: ignore[type-abstract]
