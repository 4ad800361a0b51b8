"""Text chunks: files of one text a line, published under their names only when they are complete."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from distill.run.files import publish, sha256_of


def read_chunk(path: Path) -> list[str]:
    """The texts of a chunk; only "\\n" ends one. Raises ValueError if the last has no end: the file was cut off."""
    text = path.read_bytes().decode()
    if text and text[-1] != "\n":
        raise ValueError(f"{path} does not end with a newline: it was cut off; prepare the text again")
    return text.split("\n")[:-1]


def read_listed_chunk(folder: Path, entry: dict[str, Any]) -> tuple[list[str], np.ndarray | None]:
    """The texts of the chunk that an entry of the manifest describes, and their raw row numbers, int64, if it has them.

    Raises ValueError if a byte of them is not as it was written.
    """
    path, rows = folder / f"{entry['name']}.txt", folder / f"{entry['name']}.rows.npy"
    verify(path, entry["sha256"])
    if not rows.exists() and "rows_sha256" not in entry:
        return read_chunk(path), None
    verify(rows, entry.get("rows_sha256"))
    return read_chunk(path), np.load(rows, allow_pickle=False)


def verify(path: Path, sha256: str | None) -> None:
    """Raises ValueError if a file of the prepared text is missing or not as it was written."""
    if not path.is_file() or sha256_of(path) != sha256:
        raise ValueError(f"{path} is not as it was written (sha256): delete {path.parent} to prepare the text again")


class ChunkWriter:
    """Writes lines (bytes, with their "\\n") into 000000.txt, 000001.txt, ..., each of `rows_per_chunk` lines but the last.

    With has_rows, writes NAME.rows.npy (int64) beside each. With `name`, the only file has that name and is made even if empty.
    `entries` are the manifest's: name, rows, bytes, sha256 of the .txt, rows_sha256 of any .rows.npy. An error inside the
    `with` discards the open chunk.
    """

    def __init__(self, out: Path, rows_per_chunk: int, has_rows: bool, name: str | None = None) -> None:
        self.entries: list[dict[str, Any]] = []
        self._out, self._rows_per_chunk, self._has_rows, self._name = out, rows_per_chunk, has_rows, name
        self._file: BinaryIO | None = None
        self._publishing = ExitStack()
        self._rows: list[np.ndarray] = []
        self._sha = hashlib.sha256()
        self._num_rows = 0

    def __enter__(self) -> ChunkWriter:
        if self._name is not None:
            self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        else:
            self._publishing.__exit__(kind, error, trace)

    def write(self, lines: list[bytes], rows: np.ndarray) -> None:
        """Appends lines; `rows` [len(lines)] int64 are their raw row numbers."""
        start = 0
        while start < len(lines):
            file = self._file or self._open()
            end = min(len(lines), start + self._rows_per_chunk - self._num_rows)
            data = b"".join(lines[start:end])
            file.write(data)
            self._sha.update(data)
            self._rows.append(rows[start:end])
            self._num_rows += end - start
            start = end
            if self._num_rows == self._rows_per_chunk:
                self._finish()

    def _open(self) -> BinaryIO:
        self._file = self._publishing.enter_context(publish(self._out / f"{self._stem()}.txt"))
        return self._file

    def _finish(self) -> None:
        if self._file is None:
            return
        num_bytes = self._file.tell()
        self._publishing.close()
        entry = {"name": self._stem(), "rows": self._num_rows, "bytes": num_bytes, "sha256": self._sha.hexdigest()}
        if self._has_rows:
            path = self._out / f"{self._stem()}.rows.npy"
            with publish(path) as file:
                np.save(file, np.concatenate([np.empty(0, np.int64), *self._rows]), allow_pickle=False)
            entry["rows_sha256"] = sha256_of(path)
        self.entries.append(entry)
        self._file, self._rows, self._sha, self._num_rows = None, [], hashlib.sha256(), 0

    def _stem(self) -> str:
        return self._name or f"{len(self.entries):06d}"
