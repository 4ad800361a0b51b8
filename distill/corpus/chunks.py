"""Text chunks: files of one text a line, published under their names only when they are complete.

A line break within a text is a NUL in the file, which no text has. Translations are in files of their own, in the lines of the
texts; an empty line is no translation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    [n], unless an earlier version wrote the chunk. translations: a list of n for each column, '' where there is none. name:
    that of its files, '' for texts that are in none."""

    texts: list[str]
    rows: np.ndarray | None
    sources: np.ndarray | None
    translations: Sequence[list[str]] = ()
    name: str = ""


def translation_name(stem: str, column: int) -> str:
    """The file of a column's translations beside the chunk `stem`; columns are numbered from 1."""
    return f"{stem}.translation{column:02d}.txt"


def chunk_fingerprint(entry: dict[str, Any]) -> str:
    """What identifies the texts of a chunk with their translations, from its entry in the manifest."""
    digests = [entry["sha256"], *entry.get("translations_sha256", [])]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_listed_chunk(folder: Path, entry: dict[str, Any]) -> TextChunk:
    """The chunk that an entry of the manifest describes. Raises ValueError if a byte of it is not as it was written."""
    path = folder / f"{entry['name']}.txt"
    verify(path, entry["sha256"])
    arrays = {kind: _read_array(folder / f"{entry['name']}.{kind}.npy", entry.get(f"{kind}_sha256")) for kind in ARRAYS}
    translations = []
    for column, sha256 in enumerate(entry.get("translations_sha256", []), start=1):
        translated = folder / translation_name(entry["name"], column)
        verify(translated, sha256)
        translations.append(read_chunk(translated))
    return TextChunk(read_chunk(path), **arrays, translations=translations, name=entry["name"])


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

    Beside each, NAME.sources.npy (uint16), with has_rows NAME.rows.npy (int64), and a file for each column of translations.
    With `name`, the only file has that name and is made even if empty. `entries` are the manifest's: name, rows, bytes, sha256
    of the .txt, sources_sha256, rows_sha256 and translations_sha256. An error inside the `with` discards the open chunk.
    """

    def __init__(
        self, out: Path, rows_per_chunk: int, has_rows: bool, name: str | None = None, num_translations: int = 0
    ) -> None:
        self.entries: list[dict[str, Any]] = []
        self._out, self._rows_per_chunk, self._name = out, rows_per_chunk, name
        self._kinds = [kind for kind in ARRAYS if kind != "rows" or has_rows]
        self._num_translations = num_translations
        self._files: list[BinaryIO] = []  # of the open chunk: texts, then translations
        self._publishing = ExitStack()
        self._arrays: dict[str, list[np.ndarray]] = {kind: [] for kind in self._kinds}
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

    def write(
        self, lines: list[bytes], *, rows: np.ndarray, sources: np.ndarray, translations: Sequence[list[bytes]] = ()
    ) -> None:
        """Appends lines; `rows` [len(lines)] are their raw row numbers, `sources` the numbers of their sources, `translations`
        as many lines for each column."""
        given = {"rows": rows, "sources": sources}
        start = 0
        while start < len(lines):
            files = self._files or self._open()
            end = min(len(lines), start + self._rows_per_chunk - self._num_rows)
            for number, (file, of_file) in enumerate(zip(files, (lines, *translations), strict=True)):
                data = b"".join(of_file[start:end])
                file.write(data)
                self._shas[number].update(data)
            for kind in self._kinds:
                self._arrays[kind].append(given[kind][start:end])
            self._num_rows += end - start
            start = end
            if self._num_rows == self._rows_per_chunk:
                self._finish()

    def _open(self) -> list[BinaryIO]:
        stem = self._stem()
        names = [f"{stem}.txt", *(translation_name(stem, column + 1) for column in range(self._num_translations))]
        self._files = [self._publishing.enter_context(publish(self._out / name)) for name in names]
        self._shas = [hashlib.sha256() for _ in names]
        return self._files

    def _finish(self) -> None:
        if not self._files:
            return
        num_bytes = self._files[0].tell()
        self._publishing.close()
        digests = [sha.hexdigest() for sha in self._shas]
        entry: dict[str, Any] = {"name": self._stem(), "rows": self._num_rows, "bytes": num_bytes, "sha256": digests[0]}
        if self._num_translations:
            entry["translations_sha256"] = digests[1:]
        for kind in self._kinds:
            path = self._out / f"{self._stem()}.{kind}.npy"
            publish_array(path, np.concatenate([np.empty(0, ARRAYS[kind]), *self._arrays[kind]]).astype(ARRAYS[kind]))
            entry[f"{kind}_sha256"] = sha256_of(path)
        self.entries.append(entry)
        self._files, self._num_rows = [], 0
        self._arrays = {kind: [] for kind in self._kinds}

    def _stem(self) -> str:
        return self._name or f"{len(self.entries):06d}"
