"""Damage to files, and where it shows: 1 bit flipped, the second half cut off, emptied, deleted."""

from __future__ import annotations

import random
import re
from pathlib import Path

HOW = ("flip", "truncate", "empty", "delete")


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Damages a file in one of the ways of HOW."""
    if how == "delete":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "flip":
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes({"flip": content, "truncate": content[: len(content) // 2], "empty": b""}[how])


def files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """The files below a folder that are not empty, by their relative path without its numbers."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        kind = re.sub("[0-9]+", "N", re.sub("[0-9a-f]{6,}", "N", str(path.relative_to(folder))))
        found.setdefault(kind, []).append(path)
    return found
