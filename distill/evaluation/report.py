"""Results as a table that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str | None]]


def figure(*keys: str, form: str = "{}") -> Callable[[Row], str | None]:
    """A column: the value under row[key][key]..., formatted; None where it is not there."""

    def cell(row: Row) -> str | None:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else form.format(value)

    return cell


def _sts_average(row: Row) -> str | None:
    sts = row.get("sts") or {}
    return f"{sts['AVG']:.2f} ({len(sts['AVG_OF'])} sets)" if "AVG" in sts else None


MODEL_COLUMNS: Columns = {
    "model": figure("model"),
    "params": figure("params", form="{:,}"),
    "dim": figure("dim"),
    "bytes/vector": figure("bytes_per_vector"),
    "sentences/s": figure("sentences_per_second", form="{:,.0f}"),
    "STS avg": _sts_average,
    "spearman": figure("fidelity", "spearman", form="{:.3f}"),
    "top-50": figure("fidelity", "spearman_top50", form="{:.3f}"),
    "top-10": figure("fidelity", "top10", form="{:.3f}"),
}
"""Of a row like results.json's, with `model` its name and `sentences_per_second` beside the rest."""


def table(rows: Sequence[Row], columns: Columns = MODEL_COLUMNS) -> str:
    """An aligned plain-text table: the first column to the left, the others to the right, "-" for what a row has not."""
    lines = [list(columns)] + [[cell(row) or "-" for cell in columns.values()] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
