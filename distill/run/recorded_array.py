"""Arrays on disk with their size and sha256 beside them, verified before they are read back.

triplets.npy is an array; triplets.json is written after it. An array without a record is not complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from distill.run.files import publish, read_json, set_aside, sha256_of, write_json


def save_array(path: Path, array: np.ndarray) -> None:
    """Publishes an .npy file and its record."""
    publish_array(path, array)
    write_json(path.with_suffix(".json"), _record(path))


def publish_array(path: Path, array: np.ndarray) -> None:
    """Publishes an .npy file."""
    with publish(path) as file:
        np.lib.format.write_array(_OnlyWritten(file), array, allow_pickle=False)


class _OnlyWritten:
    """A file that numpy writes to as to any other object: what it does with a real one raises errors without their number."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def is_saved(path: Path) -> bool:
    """Whether `save_array` completed and the file is what it wrote; one that is not is renamed to *.npy.damaged."""
    record = read_json(path.with_suffix(".json"))
    if record is None or not path.is_file():
        return False
    if record == _record(path):
        return True
    set_aside(path, "it does not match its checksum")
    return False


def _record(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}
