"""Tab-separated files with a header line, plain or gzipped. Quotes are text."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path


def read_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each row's place, as "FILE, line 7", and its values of `columns`. Raises ValueError that names the file and line."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = set(columns) - set(reader.fieldnames or [])
            if missing:
                raise ValueError(f"{path} has no column {', '.join(sorted(missing))} in its header line: {reader.fieldnames}")
            for row in reader:
                values = [row[column] for column in columns]
                if None in values:
                    raise ValueError(f"{path}, line {reader.line_num}: the row is shorter than the header line")
                yield f"{path}, line {reader.line_num}", values
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
