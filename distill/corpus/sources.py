"""From a source of the config to raw strings, lazily and in a fixed order.

    file            path or glob -> the lines of .txt, or one field of .tsv .csv .jsonl .parquet
    parallel        path or glob -> several fields of .tsv .csv .jsonl .parquet: a text and its translations
    huggingface     a dataset's name or folder -> one field, streaming

A source that cannot be read raises ValueError naming the file, the line where there is one, and what to do.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distill.corpus.rows import file_format, read_numbered_rows, read_rows, rows_of
from distill.corpus.text_config import SourceConfig, TextConfig
from distill.run.files import DigestCache, fingerprint
from distill.run.hub import dataset_commit
from distill.run.temporary import hub_error

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def read_source(source: SourceConfig) -> Iterator[str]:
    """The first `source.limit` raw strings of a source, in an order that depends on the source alone, in constant memory.

    A null in the data is an empty string, so that the n-th string belongs to the n-th row. Raises ValueError where
    something cannot be read; a mistake in the config's own values is raised at the first string, not at the call. Of
    parallel text it is the teacher's column.
    """
    return (texts[0] for texts in read_translated(source))


def read_translated(source: SourceConfig) -> Iterator[tuple[str, ...]]:
    """The same, each text with its translations, '' for one that is missing: the values of `source.columns`, if it has any."""
    readers = {"file": _read_files, "parallel": _read_files, "huggingface": _read_dataset}
    return islice(readers[source.type](source), source.limit)


def check_source(source: SourceConfig) -> None:
    """Reads the first row of every file of a source, so that a misspelt path or field is found before hours of reading.

    Raises the ValueError that reading it would. A Hugging Face dataset is not checked: opening it takes as long as reading.
    """
    if source.type != "huggingface":
        for path in _matching_files(source):
            next(_read_file(source, path), None)


def _read_files(source: SourceConfig) -> Iterator[tuple[str, ...]]:
    for path in _matching_files(source):
        yield from _read_file(source, path)


def _read_file(source: SourceConfig, path: Path) -> Iterator[tuple[str, ...]]:
    """The rows of one file; of parallel text, an object of a .jsonl may lack translations."""
    if source.columns is not None:
        numbered = read_numbered_rows(str(path), source.columns, optional=source.columns[1:])
        return (row for _, row in numbered)
    return read_rows(str(path), () if source.field is None else (source.field,))


def _matching_files(source: SourceConfig) -> list[Path]:
    pattern = source.path or ""
    paths = matching_files(source)
    if not paths:
        what = (
            "is a folder; add a glob such as /*.txt" if Path(pattern).is_dir() else "names no file, and as a glob matches none"
        )
        raise ValueError(f"text source {pattern!r} {what} (relative to {Path.cwd()})")
    for path in paths:
        file_format(path)
    return paths


def matching_files(source: SourceConfig) -> list[Path]:
    """The files that match a source's path or glob, sorted; may be empty."""
    pattern = source.path or ""
    _refuse_url(pattern, "path")
    return glob_files(pattern)


def glob_files(pattern: str) -> list[Path]:
    """The files that a path or glob matches, sorted; may be empty."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    folder = next((str(each) for each in Path(pattern).parents if each.is_dir()), "")
    if pattern.startswith(folder):  # the part that is there is no pattern, whatever characters it has
        pattern = glob.escape(folder) + pattern.removeprefix(folder)
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207, Path.glob takes no absolute pattern
    return [path for path in map(Path, sorted(matches)) if path.is_file()]


def _refuse_url(value: str, key: str) -> None:
    if _URL.match(value):
        raise ValueError(
            f"text source `{key}: {value}` looks like a URL or a command, and only local files are read;"
            " fetch it first, or write ./ before a file name that has a colon"
        )


def _read_dataset(source: SourceConfig) -> Iterator[tuple[str, ...]]:
    return read_dataset(source.name or "", (source.field or "",), source.split, source.subset, source.revision)


def read_dataset(
    name: str, fields: Sequence[str], split: str, subset: str | None = None, revision: str | None = None
) -> Iterator[tuple[str, ...]]:
    """The values of `fields`, in that order, of every row of a Hugging Face dataset, streaming; a null is an empty string.

    Raises ValueError naming the dataset and, for an unknown field, those it has; TemporaryError if the hub does not answer.
    """
    _refuse_url(name, "name")
    import datasets

    where = f"Hugging Face dataset {name!r} (subset {subset}, split {split})"
    wheres = [f"field {field!r}" for field in fields]
    try:
        stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        batches: Iterator[dict[str, list[Any]]] = stream.iter(batch_size=1000)
        for batch in batches:
            for field in fields:
                if field not in batch:
                    raise ValueError(f"no field {field!r}; its fields are {', '.join(sorted(batch))}")
            for values in zip(*(batch[field] for field in fields), strict=True):
                yield from rows_of(values, wheres)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise hub_error(f"cannot read the {where}: {error}", error) from error


def source_files(config: TextConfig) -> list[Path]:
    """The local files that the text is read from, in their order."""
    return [path for source in config.sources if source.path for path in matching_files(source)]


def source_fingerprints(config: TextConfig, digests: DigestCache, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Path -> sha256 of each local file; name of a Hugging Face dataset -> its `dataset_fingerprint`.

    recorded: an earlier result, whose values stay for datasets on the hub without a revision, '' included.
    """
    found = {str(path): digests.sha256(path) for path in source_files(config)}
    for source in config.sources:
        if source.name and source.name in (recorded or {}) and _is_unpinned(source):
            found[source.name] = (recorded or {})[source.name]
        elif source.name:
            found[source.name] = dataset_fingerprint(source.name, source.revision, digests)
    return found


def _is_unpinned(source: SourceConfig) -> bool:
    """Whether a source is a dataset on the hub without a revision."""
    return bool(source.name) and not source.revision and not Path(str(source.name)).is_dir()


def pinned(config: TextConfig, commits: Mapping[str, str]) -> TextConfig:
    """The config with the commit of each hub dataset as its revision, where it has none: what is read is what was recorded."""
    sources = [
        source.model_copy(update={"revision": commits.get(str(source.name)) or None}) if _is_unpinned(source) else source
        for source in config.sources
    ]
    return config.model_copy(update={"sources": sources})


def dataset_fingerprint(name: str, revision: str | None, digests: DigestCache) -> str:
    """The content of a dataset in a folder; of one on the hub its revision, or the commit of its main branch.

    '' of one on the hub without a revision where the hub cannot be reached.
    """
    folder = Path(name)
    if not folder.is_dir():
        return revision or dataset_commit(name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint({str(path.relative_to(folder)): digests.sha256(path) for path in files})
