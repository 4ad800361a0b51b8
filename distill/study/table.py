"""A study's rows as results.json and as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.evaluation.bootstrap import difference
from distill.evaluation.report import Columns, between, figure, table

Row = Mapping[str, Any]
TEACHER = "teacher"


def results_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows without resamples, but with what they are for: `to_teacher` and `to_origin`, differences of the STS average with
    their 95% intervals, {"difference": d, "ci": [low, high]}; each form gets one to its own float32 as `to_float32`."""
    by_name = {row["model"]: row for row in rows}

    def float32(row: Row) -> Row:
        return row["forms"]["float32"]

    results = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key != "forms"}
        if row["model"] != TEACHER:
            kept["to_teacher"] = _difference(float32(by_name[TEACHER]), float32(row))
        if row["origin"] in by_name:
            kept["to_origin"] = _difference(float32(by_name[row["origin"]]), float32(row))
        kept["forms"] = {
            name: {key: value for key, value in form.items() if key not in ("sts_resamples", "sts_warnings")}
            | ({"to_float32": _difference(float32(row), form)} if name != "float32" else {})
            for name, form in row["forms"].items()
        }
        results.append(kept)
    return results


def _difference(first: Row, second: Row) -> dict[str, Any]:
    return {
        "difference": second["sts"]["AVG"] - first["sts"]["AVG"],
        "ci": difference(first["sts_resamples"]["AVG"], second["sts_resamples"]["AVG"]),
    }


def _against(key: str) -> Callable[[Row], str | None]:
    value, interval = figure(key, "difference", form="{:+.2f}"), between("ci", "{:+.2f}")
    return lambda row: f"{value(row)} ({interval(row[key])})" if key in row else None


def _form(name: str) -> Callable[[Row], str | None]:
    return figure("forms", name, "sts", "AVG", form="{:.2f}")


COLUMNS: Columns = {
    "model": figure("model"),
    "params": lambda row: f"{row['params'] / 1e6:.0f}M",
    "dim": figure("dim"),
    "bytes": figure("forms", "float32", "bytes_per_vector", form="{:,}"),
    "sentences/s": figure("sentences_per_second", form="{:,.0f}"),
    "minutes": figure("minutes", form="{:.1f}"),
    "STS": _form("float32"),
    "to the teacher (95%)": _against("to_teacher"),
    "to its origin (95%)": _against("to_origin"),
    "int8": _form("int8"),
    "binary": _form("binary"),
    "fidelity": lambda row: " / ".join(f"{row['fidelity'][name]:.3f}" for name in ("spearman", "spearman_top50", "top10")),
}
"""fidelity: Spearman over all pairs, over each sentence's 50 nearest, and the share of its 10 nearest."""


def text(results: Sequence[Row]) -> str:
    """For a terminal."""
    return table(results, COLUMNS)


def markdown(results: Sequence[Row]) -> str:
    """For a README."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    lines += [[cell(row) or "-" for cell in COLUMNS.values()] for row in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
