"""Rows of datasets on the Hugging Face hub, or in a folder laid out like one, for the evaluation sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distill.corpus.rows import text_of
from distill.run.temporary import hub_error

PREFIX = "hub:"
NUMBERED = ("_id", "query-id", "corpus-id", "label")  # columns that may hold whole numbers


def only_split(
    name: str, config: str | None, columns: tuple[str, ...], defaults: Mapping[str, Any] | None = None
) -> Iterable[tuple[Any, ...]]:
    """The rows of the split test, or of the only one."""
    splits = hub_splits(name, config)
    if "test" not in splits and len(splits) != 1:
        raise ValueError(f"{PREFIX}{name} has {splits} as splits of {config or 'its qrels'}: neither test nor a single one")
    return hub_rows(name, columns, "test" if "test" in splits else splits[0], config, defaults)


def hub_rows(
    name: str,
    columns: tuple[str, ...],
    split: str,
    config: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Iterable[tuple[Any, ...]]:
    """The values of `columns` in one split of a hub dataset, downloaded once; an absent column is its default in every row.

    A null text is an empty string, as in files; ids and labels may be whole numbers. Raises ValueError for other types,
    and TemporaryError if the hub does not answer.
    """
    import datasets

    where = f"the Hugging Face dataset {name} ({f'{config}, ' if config else ''}split {split})"
    with _hub_errors(where):
        rows = datasets.load_dataset(name, config, split=split)
        absent = {
            column: [default] * len(rows) for column, default in (defaults or {}).items() if column not in rows.column_names
        }
        values = zip(*(absent.get(column) or rows[column] for column in columns), strict=True)
    return (
        tuple(_checked(value, column, f"{where}, row {number}") for column, value in zip(columns, row, strict=True))
        for number, row in enumerate(values, start=1)
    )


def _checked(value: Any, column: str, where: str) -> Any:
    if column == "score":
        return value
    is_number = column in NUMBERED and isinstance(value, int)
    return str(value) if is_number else text_of(value, f"{where}, field {column!r}")


def hub_splits(name: str, config: str | None = None) -> list[str]:
    import datasets

    with _hub_errors(f"the Hugging Face dataset {name}"):
        return datasets.get_dataset_split_names(name, config)


def hub_configs(name: str) -> list[str]:
    import datasets

    with _hub_errors(f"the Hugging Face dataset {name}"):
        return datasets.get_dataset_config_names(name)


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise hub_error(f"cannot read {where}: {error}; without a connection, name a folder of files instead", error) from error
