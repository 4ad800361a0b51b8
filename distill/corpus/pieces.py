"""Files of sentences, one a line: written under a temporary name, flushed, described, then named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np


def read_piece(path: Path) -> list[str]:
    """The sentences of a piece; only "\\n" ends one. Raises ValueError if the last has no end: the file was cut off."""
    text = path.read_bytes().decode()
    if text and text[-1] != "\n":
        raise ValueError(f"{path} does not end with a newline: it was cut off; prepare the text again")
    return text.split("\n")[:-1]


class PieceWriter:
    """Writes lines (bytes, with their "\\n") into 000000.txt, 000001.txt, ... of `rows_per_piece` lines but the last.

    With has_rows, NAME.rows.npy (int64) beside each. With `name`, the one file has that name and is made even if empty.
    `entries` are the manifest's: name, rows, bytes, sha256 of the .txt. Leaving the `with` by an error leaves a .part file.
    """

    def __init__(self, out: Path, rows_per_piece: int, has_rows: bool, name: str | None = None) -> None:
        self.entries: list[dict[str, Any]] = []
        self._out, self._rows_per_piece, self._has_rows, self._name = out, rows_per_piece, has_rows, name
        self._file: BinaryIO | None = None
        self._rows: list[np.ndarray] = []
        self._sha = hashlib.sha256()
        self._num_rows = 0

    def __enter__(self) -> PieceWriter:
        if self._name is not None:
            self._file = self._part().open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def write(self, lines: list[bytes], rows: np.ndarray) -> None:
        """Appends lines; `rows` [len(lines)] int64 are their raw row numbers."""
        start = 0
        while start < len(lines):
            if self._file is None:
                self._file = self._part().open("wb")
            end = min(len(lines), start + self._rows_per_piece - self._num_rows)
            data = b"".join(lines[start:end])
            self._file.write(data)
            self._sha.update(data)
            self._rows.append(rows[start:end])
            self._num_rows += end - start
            start = end
            if self._num_rows == self._rows_per_piece:
                self._finish()

    def _finish(self) -> None:
        if self._file is None:
            return
        num_bytes = self._file.tell()
        publish(self._file, self._part())
        if self._has_rows:
            path = self._out / f"{self._stem()}.rows.npy.part"
            with path.open("wb") as file:
                np.save(file, np.concatenate([np.empty(0, np.int64), *self._rows]), allow_pickle=False)
                publish(file, path)
        self.entries.append({"name": self._stem(), "rows": self._num_rows, "bytes": num_bytes, "sha256": self._sha.hexdigest()})
        self._file, self._rows, self._sha, self._num_rows = None, [], hashlib.sha256(), 0

    def _stem(self) -> str:
        return self._name or f"{len(self.entries):06d}"

    def _part(self) -> Path:
        return self._out / f"{self._stem()}.txt.part"


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Writes manifest.json, which says that everything else in `out` is complete."""
    path = out / "manifest.json.part"
    with path.open("wb") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        publish(file, path)
    folder = os.open(out, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def publish(file: BinaryIO, part: Path) -> None:
    """Flushes and closes an open NAME.part, then names it NAME."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    part.rename(part.with_suffix(""))
