"""Rows of a local file: .txt .tsv .csv .jsonl .parquet, plain, .gz or .zst, a row at a time.

A .tsv has no quoting: a tab ends a field, a newline a row. A .csv is quoted as RFC 4180 has it. Both start with a header.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from distill.run.files import LFS_POINTER, is_lfs_pointer

FORMATS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
MAX_LINE_BYTES = 1 << 24
csv.field_size_limit(MAX_LINE_BYTES)  # Python's own is 131,072 characters

Record = tuple[int, list[str]]
NumberedRow = tuple[int, tuple[str, ...]]


def read_rows(path: str, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The values of `fields`, in that order, of every row of a file, in constant memory.

    `fields` are columns of .tsv, .csv and .parquet or keys of .jsonl; for .txt it is empty and the line is the only value.
    A null is an empty string, bytes are decoded as UTF-8; blank lines of .tsv (of several columns), .csv and .jsonl are no
    rows. If one field is requested and holds a list of strings, such as the captions of one picture, each is a row.
    Raises ValueError naming the file, the line where there is one, and the fix.
    """
    return (values for _, values in read_numbered_rows(path, fields))


def read_numbered_rows(path: str, fields: Sequence[str], optional: Sequence[str] = ()) -> Iterator[NumberedRow]:
    """The same, each row with its line number from 1 (0 in .parquet). Fields that are `optional` may be absent from a .jsonl
    object, as empty strings."""
    suffix = file_format(Path(path))
    if is_lfs_pointer(Path(path)):
        raise ValueError(f"{path} {LFS_POINTER}")
    if (suffix == ".txt") != (not fields):
        known = " and its lines are all it has: remove `field`" if fields else f"; {_known_fields(Path(path), suffix)}"
        raise ValueError(f"{path}: a {suffix} file {'has no fields' if fields else 'needs `field`'}{known}")
    if suffix == ".jsonl":
        return _read_jsonl(Path(path), fields, optional)
    return _READERS[suffix](Path(path), fields)


def file_format(path: Path) -> str:
    """The member of FORMATS that the name ends in, before a compression; ValueError if there is none."""
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        if suffixes[-1:] == [".parquet"]:
            raise ValueError(f"{path}: parquet compresses its own columns and cannot be read through {path.suffix}; unpack it")
    if not suffixes or suffixes[-1] not in FORMATS:
        raise ValueError(f"{path}: unknown kind of file; known are {' '.join(FORMATS)}, all but the last also with .gz or .zst")
    return suffixes[-1]


def text_of(value: Any, where: str) -> str:
    """A string as it is and a null as an empty one; ValueError, beginning with `where`, for anything else."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: bytes that are not UTF-8 ({error.reason} at {error.start}); convert them") from None
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string, found {type(value).__name__} {str(value)[:40]!r}; name another field")
    return value


def rows_of(values: Sequence[Any], wheres: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The row of these values; a row for each string if the only value is a list. wheres: where each was found, for errors."""
    if len(values) == 1 and isinstance(values[0], list):
        yield from ((text_of(value, wheres[0]),) for value in values[0])
    else:
        yield tuple(text_of(value, where) for value, where in zip(values, wheres, strict=True))


def _known_fields(path: Path, suffix: str) -> str:
    if suffix == ".parquet":
        names = _open_parquet(path).schema_arrow.names
    elif suffix == ".jsonl":
        names = list(next(_json_objects(path), (0, {}))[1])
    else:
        names = next(_RECORDS[suffix](path), (0, []))[1]
    return f"its fields are {', '.join(names)}"


def _read_txt(path: Path, fields: Sequence[str]) -> Iterator[NumberedRow]:
    for number, line in _lines(path):
        yield number, (line.removesuffix("\n").removesuffix("\r"),)


def _read_table(path: Path, fields: Sequence[str]) -> Iterator[NumberedRow]:
    records = _RECORDS[file_format(path)](path)
    _, header = next(records, (0, []))
    for field in fields:
        if field not in header:
            raise ValueError(f"{path}: no column {field!r} in its header; its columns are {', '.join(header)}")
        _check_unique(path, field, header)
    columns = [header.index(field) for field in fields]
    for number, record in records:
        if len(record) != len(header):
            raise ValueError(f"{path}, line {number}: {len(record)} columns where the header has {len(header)}; fix this line")
        yield number, tuple(record[column] for column in columns)


def _check_unique(path: Path, field: str, columns: Sequence[str]) -> None:
    if (count := columns.count(field)) > 1:
        raise ValueError(f"{path}: {count} columns are called {field!r}; rename all but the one that is meant")


def tsv_records(path: Path) -> Iterator[Record]:
    """(line number from 1, fields) of every line of a .tsv, its header included."""
    num_columns = 0
    for number, line in _lines(path):
        record = line.removesuffix("\n").removesuffix("\r").split("\t")
        num_columns = num_columns or len(record)
        if record != [""] or num_columns == 1:
            yield number, record


def _csv_records(path: Path) -> Iterator[Record]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid csv ({error}); check its quotes") from None
        if record:
            yield reader.line_num, record


def _read_jsonl(path: Path, fields: Sequence[str], optional: Sequence[str]) -> Iterator[NumberedRow]:
    for number, value in _json_objects(path):
        for field in fields:
            if field not in value and field not in optional:
                raise ValueError(f"{path}, line {number}: no field {field!r}; its fields are {', '.join(value)}")
        wheres = [f"{path}, line {number}, field {field!r}" for field in fields]
        yield from ((number, row) for row in rows_of([value.get(field) for field in fields], wheres))


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); a .jsonl has one object a line") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: JSON, but no object {{...}} with fields; a .jsonl has one object a line")
        yield number, value


def _read_parquet(path: Path, fields: Sequence[str]) -> Iterator[NumberedRow]:
    file = _open_parquet(path)
    schema = file.schema_arrow
    for field in fields:
        if field not in schema.names:
            raise ValueError(f"{path}: no column {field!r}; its columns are {', '.join(schema.names)}")
        _check_unique(path, field, schema.names)
    wheres = [f"{path}, column {field!r}" for field in fields]
    try:
        for batch in file.iter_batches(batch_size=4096, columns=list(dict.fromkeys(fields)), use_threads=False):
            for values in zip(*(batch.column(field).to_pylist() for field in fields), strict=True):
                yield from ((0, row) for row in rows_of(values, wheres))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: its parquet data cannot be read ({error}); it may be damaged") from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its newline) of a UTF-8 file, a byte order mark removed; only \\n ends a line."""
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES and raw[-1:] != b"\n":
                    raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; is this a text file?")
                line = raw.decode()
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1});"
            " convert the file, for instance with iconv"
        ) from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        where = f" after line {number}" if number else ""
        raise ValueError(f"{path}: cannot be read{where} ({error}); is it missing, damaged or cut off?") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path), 1 << 17)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path), 1 << 17)
    return path.open("rb")


class _ZstdReader(io.RawIOBase):
    """The content of all frames of a .zst file; EOFError if the last is cut off, which zstandard's own reader ignores."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = self._new_frame()
        self._inside_frame = False
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside_frame = self._new_frame(), False
            data = data or self._file.read(1 << 12)  # expands to 128 MB at the very worst
            if not data:
                if self._inside_frame:
                    raise EOFError("a zstd frame ends before its end marker")
                return 0
            self._inside_frame = True
            self._content = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    @staticmethod
    def _new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_RECORDS = {".tsv": tsv_records, ".csv": _csv_records}
_READERS = {".txt": _read_txt, ".tsv": _read_table, ".csv": _read_table, ".parquet": _read_parquet}
