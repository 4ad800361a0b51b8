"""Evaluation sets on the Hugging Face hub, named as hub:OWNER/NAME."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = "hub:"


def is_on_hub(where: str | Path) -> bool:
    return str(where).startswith(PREFIX)


def set_name(where: str | Path) -> str:
    """What the results of a set are kept under: the last part of its folder's or hub name."""
    return str(where).rsplit("/", 1)[-1].removeprefix(PREFIX) if is_on_hub(where) else Path(where).resolve().name


def read_rows(
    name: str, columns: tuple[str, ...], *, split: str, config: str | None = None, defaults: Mapping[str, Any] | None = None
) -> Iterable[tuple[Any, ...]]:
    """The rows of one split of a hub dataset, as values of `columns`; one that it has not is its default in every row.

    Raises ValueError if the dataset cannot be fetched or lacks a column that has no default.
    """
    import datasets

    defaults = defaults or {}
    with _named(f"the Hugging Face dataset {name} ({f'{config}, ' if config else ''}split {split})"):
        rows = datasets.load_dataset(name, config, split=split)
        absent = {column: [default] * len(rows) for column, default in defaults.items() if column not in rows.column_names}
        return zip(*(absent.get(column) or rows[column] for column in columns), strict=True)


def configs_of(name: str) -> list[str]:
    """The configurations of a hub dataset. Raises ValueError if there is no such dataset, or no connection."""
    import datasets

    with _named(f"the Hugging Face dataset {name}"):
        return datasets.get_dataset_config_names(name)


def splits_of(name: str, config: str | None = None) -> list[str]:
    """The splits of a hub dataset. Raises ValueError if there is no such dataset, or no connection."""
    import datasets

    with _named(f"the Hugging Face dataset {name}"):
        return datasets.get_dataset_split_names(name, config)


@contextmanager
def _named(where: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot read {where}: {error}; without a connection, name a folder of files instead") from error
