"""The best student of a training stage on disk: replaced as a whole, after every dev evaluation that improved.

Every checkpoint holds a copy of it, and a run that continues from a checkpoint takes it from there: whenever a run is killed,
the student is that of the restored `best_step`.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.run.collectives import barrier, rank
from distill.run.files import flush, naming
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

    def keep(self, student: Student) -> None:
        """Writes the engine's weights as the best student."""
        state = whole_state(self._engine)
        if self.merge is not None:
            for name, initial in self._initial.items():
                state[name] = torch.lerp(initial.double(), state[name].double(), self.merge).to(initial.dtype)
        if rank() == 0:
            self._write(student, state)
        barrier()

    def _write(self, student: Student, state: dict[str, Tensor]) -> None:
        part = self.directory.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        extra = {name: value.contiguous() for name, value in state.items() if not name.startswith(PREFIX)}
        with naming(part):
            student.save(part, own, extra)
            flush_folder(part)
        _put_in_place(part, self.directory)


def link_folder(source: Path, target: Path) -> None:
    """Makes `target` a copy of a folder: hard links, or copies where the file system has none."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    shutil.copytree(source, target, copy_function=link)


def copy_folder(folder: Path) -> None:
    """Replaces every file of a folder by a copy of its own, where it is a hard link."""
    for path in [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink > 1]:
        part = path.with_name(f".{path.name}.part")
        shutil.copyfile(path, part)
        part.replace(path)


def restore_folder(folder: Path, kept: Path | None) -> None:
    """Makes `folder` a copy of `kept`, or absent; removes what a kill left of it."""
    for left in (folder, folder.with_suffix(".old"), folder.with_suffix(".part")):
        with suppress(FileNotFoundError):
            shutil.rmtree(left)
    if kept is not None and kept.exists():
        part = folder.with_suffix(".part")
        shutil.copytree(kept, part)
        flush_folder(part)
        _put_in_place(part, folder)


def flush_folder(folder: Path) -> None:
    """Waits until a folder and everything in it is on disk."""
    for path in [*folder.rglob("*"), *([folder] if folder.exists() else [])]:
        flush(path)


def _put_in_place(part: Path, folder: Path) -> None:
    """Gives the finished `part` the name `folder`, which is deleted once the new one is on disk."""
    old = folder.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
