"""Checkpoints: complete or absent, written in the background, the last N kept, read by any number of ranks and any ZeRO stage.

    checkpoints/step-00000100/rank-00000.safetensors ...    what each rank owned (fragments.py)
    checkpoints/step-00000100/student/                      a copy of the best student so far, STAGE/student
    checkpoints/step-00000100/COMPLETE.json                 written last: step, sha256 of every file and of this one, the loop's
                                                            state, settings that must match; then the folder loses its
                                                            suffix .part

`save` copies to host memory and returns. A thread on each rank writes, flushes and hashes; rank 0's commits once all files are
there. Rank 0 decides which checkpoint is read, and broadcasts it; a damaged one is renamed to step-00000100.damaged. One is
deleted once `keep` newer ones beside the newest are there, written by this process or verified by it.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.run.collectives import FailedElsewhere, add_over_ranks, barrier, from_rank_0, rank, world_size
from distill.run.files import flush, publish, read_json, sha256_of, unseal, write_json
from distill.run.stage import differences
from distill.training.fragments import copy_owned, file_name, load_fragments, shapes, steps_taken, write_tensors
from distill.training.student_store import copy_folder, flush_folder, link_folder, restore_folder

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.05
MAX_DIFFERENCES_SHOWN = 8
STUDENT = "student"


class Checkpoints:
    """The checkpoints of one training stage, under `directory`.

    must_match: JSON-able settings that the order of samples and the optimizer depend on. A checkpoint saved with other
    settings is refused.
    """

    def __init__(self, directory: Path, *, keep: int, device: torch.device, must_match: dict[str, Any]) -> None:
        self.directory = directory
        self.keep = keep
        self.device = device
        self.must_match = must_match
        self._writer: _Writer | None = None
        self._trusted: list[Path] = []  # written or verified by this process, ascending

    def save(self, engine: Any, step: int, state: dict[str, Any], student: Path | None = None) -> None:
        """Begins the checkpoint taken after `step` steps; all ranks call it with the same JSON-able, global `state`.

        student: the folder of the best student, if there is one yet. Waits for the previous checkpoint first, and raises
        its error if it failed.
        """
        self.wait()
        part = self.directory / f"step-{step:08d}.part"
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            if student is not None and student.exists():
                link_folder(student, part / STUDENT)
        barrier()
        tensors = copy_owned(engine)
        described = {
            "step": step,
            "adam_steps": steps_taken(engine),
            "world_size": world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "state": state,
            "must_match": self._must_match(engine),
        }
        self._writer = _Writer(part, tensors, described, self.keep, self._trusted)
        self._writer.start()

    def check(self) -> None:
        """Raises what has gone wrong on this rank in the background; not a collective."""
        if self._writer is not None and self._writer.error is not None:
            raise self._writer.error

    def wait(self) -> None:
        """Returns once the checkpoint under way is committed; all ranks call it. Raises on all if any could not write."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.written.wait()
            self._raise_together(writer)
            writer.join()
            self._raise_together(writer)
        finally:
            writer.abandoned.set()

    def load(self, engine: Any, student: Path | None = None) -> dict[str, Any] | None:
        """Restores the newest checkpoint whose checksums hold and returns its `state`; None if there is none.

        student: the folder to restore the checkpoint's best student into; it is deleted if the checkpoint has none. Raises
        ValueError, naming the settings that differ, if the checkpoint was saved with other settings.
        """
        described = from_rank_0(self._newest_valid() if rank() == 0 else None, self.device)
        folder = self.directory / f"step-{described['step']:08d}" if described else None
        if described and (changed := differences(described["must_match"], self._must_match(engine))):
            more = f"; and {len(changed) - MAX_DIFFERENCES_SHOWN} more" if len(changed) > MAX_DIFFERENCES_SHOWN else ""
            raise ValueError(
                f"{folder} was saved with other settings ({'; '.join(changed[:MAX_DIFFERENCES_SHOWN])}{more}):"
                f" restore them to continue it, use another name=, or delete {self.directory} to begin the stage again"
            )
        if student is not None:
            if rank() == 0:
                restore_folder(student, folder / STUDENT if folder else None)
            barrier()
        if folder is None or described is None:
            return None
        load_fragments(engine, [folder / name for name in sorted(described["files"])], described["adam_steps"])
        return described["state"]

    def _must_match(self, engine: Any) -> dict[str, Any]:
        return json.loads(json.dumps(self.must_match | {"parameters": shapes(engine)}))

    def _raise_together(self, writer: _Writer) -> None:
        """Raises a writer's error on its rank, and FailedElsewhere on the others; a collective."""
        error = writer.error
        failed = torch.zeros(world_size(), dtype=torch.int32, device=self.device)
        failed[rank()] = error is not None
        failed = add_over_ranks(failed)
        if error is not None:
            raise error
        if failed.any():
            raise FailedElsewhere(f"{writer.part}: rank {failed.argmax()} could not write its part of the checkpoint")

    def _newest_valid(self) -> dict[str, Any] | None:
        """COMPLETE.json of the checkpoint to continue from; removes what a killed run left half-written or half-deleted."""
        for part in self.directory.glob("step-*.part"):
            shutil.rmtree(part)
        for folder in reversed(_folders(self.directory)):
            described, damage = _read(folder)
            if damage is None:
                self._trusted.append(folder)
                return described
            aside = folder.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            logger.warning("%s is damaged and is passed over: %s; it is now %s", folder, damage, aside.name)
        return None


class _Writer(threading.Thread):
    """Writes this rank's file of one checkpoint; rank 0's also commits it. It runs beside collectives and has none itself."""

    def __init__(
        self, part: Path, tensors: dict[str, Tensor], described: dict[str, Any], keep: int, trusted: list[Path]
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.part = part
        self.tensors = tensors
        self.described = described
        self.keep = keep
        self.trusted = trusted
        self.rank = rank()
        self.error: Exception | None = None
        self.written = threading.Event()
        self.abandoned = threading.Event()

    def run(self) -> None:
        try:
            file = self.part / file_name(self.rank)
            with publish(file) as opened:
                write_tensors(opened, self.tensors)
            self.tensors.clear()
            write_json(file.with_suffix(".json"), {"sha256": sha256_of(file)})
            self.written.set()
            if self.rank == 0:
                self._commit()
        except Exception as error:
            self.error = error
        finally:
            self.written.set()

    def _commit(self) -> None:
        """Waits for every rank's file, renames the folder to its final name and deletes the checkpoints before those kept."""
        reports = [(self.part / file_name(number)).with_suffix(".json") for number in range(self.described["world_size"])]
        while not set(reports) <= set(self.part.iterdir()):  # NFS caches that a file is absent, not the listing of a folder
            if self.abandoned.wait(POLL_SECONDS * max(1, len(reports) / 64)):
                return
        files = {}
        for report in reports:
            written = read_json(report)
            if written is None:
                raise OSError(f"{report} changed after it was written")
            files[f"{report.stem}.safetensors"] = written["sha256"]
            report.unlink()
        described = self.described | {"files": files, "student": _student_digests(self.part / STUDENT)}
        write_json(self.part / "COMPLETE.json", described)
        final = self.part.with_suffix("")
        _delete(final)
        self.part.rename(final)
        flush(final.parent)
        self.trusted[:] = [path for path in self.trusted if path < final] + [final]
        if len(self.trusted) > self.keep + 1:
            self.trusted.pop(0)
            for old in _folders(final.parent):
                if old < self.trusted[0]:
                    _delete(old)


def _student_digests(folder: Path) -> dict[str, str]:
    """Makes the links to a student's files copies on disk, which share no damage; returns the sha256 of each."""
    copy_folder(folder)
    flush_folder(folder)
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _folders(directory: Path) -> list[Path]:
    """All that were complete once, in the order of their steps."""
    return sorted(path for path in directory.glob("step-*") if not path.suffix)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint so that a kill in between leaves nothing that looks like one."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_suffix(".deleted.part")))


def _read(folder: Path) -> tuple[dict[str, Any], str | None]:
    """COMPLETE.json of a checkpoint, and what is wrong with the checkpoint's files, if anything is."""
    if not (folder / "COMPLETE.json").is_file():
        return {}, "COMPLETE.json is missing"
    try:
        described = unseal((folder / "COMPLETE.json").read_bytes(), indent=1)
    except (OSError, ValueError) as error:
        return {}, f"COMPLETE.json: {error}"
    if folder.name != f"step-{described['step']:08d}":
        return described, f"COMPLETE.json is of step {described['step']}"
    return described, _damage(folder, described)


def _damage(folder: Path, described: dict[str, Any]) -> str | None:
    """What is wrong with the files that COMPLETE.json lists; None if nothing is."""
    files = described["files"] | {f"{STUDENT}/{name}": digest for name, digest in described["student"].items()}
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != digest:
            return f"{name} does not match its checksum"
    return None
