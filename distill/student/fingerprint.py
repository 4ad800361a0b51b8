"""The fingerprint of a trained student, by which the stages that read it verify that it is what was trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from distill.run.files import fingerprint, read_json, set_aside, sha256_of
from distill.run.stage import stage_fingerprint

logger = logging.getLogger(__name__)
MAX_SHOWN = 5  # names of files


def student_fingerprint(folder: Path) -> str:
    """Of everything in a student's folder: the sha256 of the names and contents of its files."""
    return files_fingerprint(student_digests(folder))


def student_digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a student's folder, by its relative path."""
    return digests_of(folder, [path for path in folder.rglob("*") if path.is_file()])


def digests_of(folder: Path, files: list[Path]) -> dict[str, str]:
    """The sha256 of files, by their paths relative to `folder`."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def files_fingerprint(digests: Mapping[str, str]) -> str:
    """Of the names and contents of files; '' of none."""
    return fingerprint(dict(digests)) if digests else ""


def check_student(stage_dir: Path) -> None:
    """Verifies that <stage_dir>/student is what the finished training stage recorded.

    One that is damaged or missing is replaced from a checkpoint that holds the same student, with a warning. Raises ValueError
    if there is none.
    """
    folder, recorded = stage_dir / "student", stage_fingerprint(stage_dir)
    digests = student_digests(folder)
    if files_fingerprint(digests) == recorded:
        return
    for kept in sorted(stage_dir.glob("checkpoints/step-????????/student"), reverse=True):
        if student_fingerprint(kept) == recorded:
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(kept, part)
            if folder.exists():
                set_aside(folder, f"it is not what was trained: {_changed(stage_dir, digests)}")
            part.rename(folder)
            logger.warning("%s: restored from %s", folder, kept.parent.name)
            return
    check_recorded(stage_dir, folder, digests)


def check_recorded(stage_dir: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Raises ValueError unless `digests`, of the files in `folder`, are those that a stage has recorded in its DONE.json."""
    if files_fingerprint(digests) != stage_fingerprint(stage_dir):
        raise ValueError(
            f"{folder}: its files are not those that the stage {stage_dir.name} recorded when it finished"
            f" ({_changed(stage_dir, digests)}); delete {stage_dir} and run that stage again"
        )


def _changed(stage_dir: Path, digests: Mapping[str, str]) -> str:
    """The names of the files that are not as the stage recorded them."""
    recorded: Mapping[str, str] = (read_json(stage_dir / "DONE.json") or {}).get("files", {})
    names = sorted(name for name in recorded.keys() | digests.keys() if recorded.get(name) != digests.get(name))
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")
