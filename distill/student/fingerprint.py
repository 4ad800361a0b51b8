"""The fingerprint of a trained student, by which the stages that read it verify that it is what was trained."""

from __future__ import annotations

from pathlib import Path

from distill.run.files import sha256_of
from distill.run.stage import stage_fingerprint


def student_fingerprint(folder: Path) -> str:
    """Of the weights in a student's folder: the first half of each file's sha256, in the order of the names."""
    return "-".join(sha256_of(path)[:32] for path in sorted(folder.glob("*.safetensors")))


def check_student(stage_dir: Path) -> None:
    """Raises ValueError unless <stage_dir>/student has the weights that the finished training stage recorded."""
    folder = stage_dir / "student"
    check_recorded(stage_dir, folder, student_fingerprint(folder))


def check_recorded(stage_dir: Path, folder: Path, found: str) -> None:
    """Raises ValueError unless `found`, the fingerprint of the weights in `folder`, is that in the DONE.json of a stage."""
    if found != stage_fingerprint(stage_dir):
        raise ValueError(
            f"{folder}: its weights are not those that the stage {stage_dir.name} recorded when it finished;"
            f" delete {stage_dir} and run that stage again"
        )
