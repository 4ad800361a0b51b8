"""Checkpoints: complete or absent, kept N last, verified before DeepSpeed opens them.

    checkpoints/step-00000100/state/...        what DeepSpeed writes
    checkpoints/step-00000100/COMPLETE.json    written last: step, world size, sha256 of every file; then the folder is renamed

DeepSpeed's loader unpickles, so a checkpoint is opened only if it lies in this run's directory and every checksum holds.
Rank 0 decides which one that is, and tells the others.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from distill.files import flush, sha256_of, write_json
from distill.training.distributed import barrier, from_rank_0, rank, world_size

TAG = "state"


class Checkpoints:
    """The checkpoints of one training stage, under `directory`."""

    def __init__(self, directory: Path, *, keep: int, device: torch.device) -> None:
        self.directory = directory
        self.keep = keep
        self.device = device

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Writes the checkpoint taken after `step` steps; all ranks call it with the same JSON-able, global `state`."""
        part = self.directory / f"step-{step:08d}.part"
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()
        engine.save_checkpoint(str(part), tag=TAG, client_state={"training": state}, save_latest=False)
        barrier()
        if rank() == 0:
            files = sorted(path for path in (part / TAG).rglob("*") if path.is_file())
            for path in files:
                flush(path)
            checksums = {str(path.relative_to(part)): sha256_of(path) for path in files}
            described = {"step": step, "world_size": world_size(), "zero": _layout(engine), "files": checksums}
            write_json(part / "COMPLETE.json", described)
            final = self.directory / f"step-{step:08d}"
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            flush(self.directory)
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)
        barrier()

    def load(self, engine: Any) -> dict[str, Any] | None:
        """Restores the newest checkpoint whose checksums hold and returns its `state`; None if there is none.

        Raises ValueError if it was taken at another world size, or with a ZeRO stage that stores it in another way.
        """
        name = from_rank_0(self._newest_sound() if rank() == 0 else None, self.device)
        if name is None:
            return None
        folder = self.directory / name
        described = json.loads((folder / "COMPLETE.json").read_text(encoding="utf-8"))
        if described["world_size"] != world_size():
            raise ValueError(
                f"{folder} was taken with {described['world_size']} ranks and this run has {world_size()}:"
                f" start it with {described['world_size']}, or delete {self.directory} to begin the stage again"
            )
        if described["zero"] != _layout(engine):
            raise ValueError(
                f"{folder} was taken with ZeRO {described['zero']} and engine.deepspeed is of ZeRO {_layout(engine)}:"
                f" put it back, or delete {self.directory} to begin the stage again"
            )
        path, state = engine.load_checkpoint(str(folder), tag=TAG)
        assert path is not None
        return state["training"]

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if p.suffix != ".part" and (p / "COMPLETE.json").is_file())

    def _newest_sound(self) -> str | None:
        for folder in reversed(self._complete()):
            if _is_sound(folder):
                return folder.name
            print(f"{folder} does not match its checksums and is passed over", file=sys.stderr, flush=True)
        return None


def _layout(engine: Any) -> str:
    """ZeRO stages that read each other's checkpoints."""
    return {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}[engine.zero_optimization_stage()]


def _is_sound(folder: Path) -> bool:
    try:
        files = json.loads((folder / "COMPLETE.json").read_text(encoding="utf-8"))["files"]
        return all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, LookupError):
        return False
