"""The fingerprint of a trained student, by which the stages that read it verify that it is what was trained."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from distill.run.files import fingerprint, set_aside, sha256_of
from distill.run.stage import stage_fingerprint

logger = logging.getLogger(__name__)


def student_fingerprint(folder: Path) -> str:
    """Of everything in a student's folder: the sha256 of the names and contents of its files."""
    return files_fingerprint(folder, [path for path in folder.rglob("*") if path.is_file()])


def files_fingerprint(folder: Path, files: list[Path]) -> str:
    """The sha256 of the names, relative to `folder`, and contents of files; '' of none."""
    return fingerprint({str(path.relative_to(folder)): sha256_of(path) for path in files}) if files else ""


def check_student(stage_dir: Path) -> None:
    """Verifies that <stage_dir>/student is what the finished training stage recorded.

    One that is damaged or missing is replaced from a checkpoint that holds the same student, with a warning. Raises ValueError
    if there is none.
    """
    folder, recorded = stage_dir / "student", stage_fingerprint(stage_dir)
    if student_fingerprint(folder) == recorded:
        return
    for kept in sorted(stage_dir.glob("checkpoints/step-????????/student"), reverse=True):
        if student_fingerprint(kept) == recorded:
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(kept, part)
            if folder.exists():
                set_aside(folder, "it is not what was trained")
            part.rename(folder)
            logger.warning("%s: restored from %s", folder, kept.parent.name)
            return
    check_recorded(stage_dir, folder, student_fingerprint(folder))


def check_recorded(stage_dir: Path, folder: Path, found: str) -> None:
    """Raises ValueError unless `found`, the fingerprint of what is in `folder`, is that in the DONE.json of a stage."""
    if found != stage_fingerprint(stage_dir):
        raise ValueError(
            f"{folder}: its files are not those that the stage {stage_dir.name} recorded when it finished;"
            f" delete {stage_dir} and run that stage again"
        )
