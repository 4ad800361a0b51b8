"""The best student of a training stage on disk: replaced as a whole, after every dev evaluation that improved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.run.collectives import barrier, rank
from distill.run.files import flush
from distill.student import Student
from distill.training.engine import whole_state

PREFIX = "student."


class StudentStore:
    """Keeps the student in `directory`: as trained, or interpolated with what the stage began with,

        theta = theta_0 + merge (theta_best - theta_0)                  WiSE-FT (arXiv 2109.01903), LM-Cocktail (2311.13534)

    Every rank calls every method. Made before a checkpoint is loaded: theta_0 is what the engine holds then.
    """

    def __init__(self, directory: Path, engine: Any, *, merge: float | None) -> None:
        self.directory = directory
        self.merge = merge
        self._engine = engine
        self._initial = whole_state(engine) if merge is not None else {}
        self._old = directory.with_suffix(".old")
        if rank() == 0 and self._old.exists():  # a kill between the two renames of `keep`
            if directory.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(directory)
        barrier()

    def keep(self, student: Student) -> None:
        """Writes the engine's weights as the best student."""
        state = whole_state(self._engine)
        if self.merge is not None:
            for name, initial in self._initial.items():
                state[name] = torch.lerp(initial.double(), state[name].double(), self.merge).to(initial.dtype)
        if rank() == 0:
            self._write(student, state)
        barrier()

    def load(self, device: torch.device) -> Student:
        return Student.load(self.directory).to(device)

    def _write(self, student: Student, state: dict[str, Tensor]) -> None:
        part = self.directory.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        extra = {name: value.contiguous() for name, value in state.items() if not name.startswith(PREFIX)}
        student.save(part, own, extra)
        for path in part.rglob("*"):
            flush(path)
        if self.directory.exists():
            self.directory.rename(self._old)
        part.rename(self.directory)
        shutil.rmtree(self._old, ignore_errors=True)
