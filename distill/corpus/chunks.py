"""Text chunks: files of one text a line, published under their names only when they are complete.

A line break within a text is a NUL in the file, which no text has.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from distill.run.files import publish, sha256_of
from distill.run.recorded_array import publish_array

ARRAYS = {"rows": np.int64, "sources": np.uint16}  # beside the texts of a chunk, as NAME.KIND.npy


def as_line(text: str) -> str:
    """The line of a text in a chunk, with its end."""
    return text.replace("\n", "\0") + "\n"


def read_chunk(path: Path) -> list[str]:
    """The texts of a chunk. Raises ValueError if the last has no end: the file was cut off."""
    text = path.read_bytes().decode()
    if text and text[-1] != "\n":
        raise ValueError(f"{path} does not end with a newline: it was cut off; prepare the text again")
    texts = text.split("\n")[:-1]
    return [each.replace("\0", "\n") for each in texts] if "\0" in text else texts


class TextChunk(NamedTuple):
    """texts [n]; rows: their raw row numbers, int64 [n], if they are recorded; sources: the numbers of their sources, uint16
    [n], unless an earlier version wrote the chunk. name: that of its files, '' for texts that are in none."""

    texts: list[str]
    rows: np.ndarray | None
    sources: np.ndarray | None
    name: str = ""


def read_listed_chunk(folder: Path, entry: dict[str, Any]) -> TextChunk:
    """The chunk that an entry of the manifest describes. Raises ValueError if a byte of it is not as it was written."""
    path = folder / f"{entry['name']}.txt"
    verify(path, entry["sha256"])
    arrays = {kind: _read_array(folder / f"{entry['name']}.{kind}.npy", entry.get(f"{kind}_sha256")) for kind in ARRAYS}
    return TextChunk(read_chunk(path), **arrays, name=entry["name"])


def _read_array(path: Path, sha256: str | None) -> np.ndarray | None:
    if not path.exists() and sha256 is None:
        return None
    verify(path, sha256)
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def verify(path: Path, sha256: str | None) -> None:
    """Raises ValueError if a file of the prepared text is missing or not as it was written."""
    if not path.is_file() or sha256_of(path) != sha256:
        raise ValueError(f"{path} is not as it was written (sha256): delete {path.parent} to prepare the text again")


class ChunkWriter:
    """Writes lines (bytes, with their "\\n") into 000000.txt, 000001.txt, ..., each of `rows_per_chunk` lines but the last.

    Beside each, NAME.sources.npy (uint16) and, with has_rows, NAME.rows.npy (int64). With `name`, the only file has that name
    and is made even if empty. `entries` are the manifest's: name, rows, bytes, sha256 of the .txt, sources_sha256 and
    rows_sha256. An error inside the `with` discards the open chunk.
    """

    def __init__(self, out: Path, rows_per_chunk: int, has_rows: bool, name: str | None = None) -> None:
        self.entries: list[dict[str, Any]] = []
        self._out, self._rows_per_chunk, self._name = out, rows_per_chunk, name
        self._kinds = [kind for kind in ARRAYS if kind != "rows" or has_rows]
        self._file: BinaryIO | None = None
        self._publishing = ExitStack()
        self._arrays: dict[str, list[np.ndarray]] = {kind: [] for kind in self._kinds}
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

    def write(self, lines: list[bytes], *, rows: np.ndarray, sources: np.ndarray) -> None:
        """Appends lines; `rows` [len(lines)] are their raw row numbers, `sources` the numbers of their sources."""
        given = {"rows": rows, "sources": sources}
        start = 0
        while start < len(lines):
            file = self._file or self._open()
            end = min(len(lines), start + self._rows_per_chunk - self._num_rows)
            data = b"".join(lines[start:end])
            file.write(data)
            self._sha.update(data)
            for kind in self._kinds:
                self._arrays[kind].append(given[kind][start:end])
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
        for kind in self._kinds:
            path = self._out / f"{self._stem()}.{kind}.npy"
            publish_array(path, np.concatenate([np.empty(0, ARRAYS[kind]), *self._arrays[kind]]).astype(ARRAYS[kind]))
            entry[f"{kind}_sha256"] = sha256_of(path)
        self.entries.append(entry)
        self._file, self._sha, self._num_rows = None, hashlib.sha256(), 0
        self._arrays = {kind: [] for kind in self._kinds}

    def _stem(self) -> str:
        return self._name or f"{len(self.entries):06d}"
