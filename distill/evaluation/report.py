"""Results as tables that a person reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distill.evaluation.bootstrap import difference
from distill.evaluation.retrieval import COMPARED, MEASURES

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


def between(key: str, form: str) -> Callable[[Row], str | None]:
    """A column: the interval under row[key], as "low .. high"; None where there is none."""
    return lambda row: " .. ".join(form.format(end) for end in row[key]) if row.get(key) else None


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

STS_COLUMNS: Columns = {
    "STS": figure("set"),
    "Spearman x 100": figure("score", form="{:.2f}"),
    "95% interval": between("ci", "{:.2f}"),
}
TRANSFER_COLUMNS: Columns = {
    "transfer": figure("set"),
    "accuracy": figure("accuracy", form="{:.4f}"),
    "95% interval": between("ci", "{:.4f}"),
    "majority": figure("majority", form="{:.4f}"),
    "labels": figure("labels"),
    "tested": figure("test", form="{:,}"),
}
QUALITY_COLUMNS: Columns = {
    "retrieval": figure("set"),
    "vectors": figure("form"),
    "bytes/vector": figure("bytes"),
    **{measure: figure(measure, form="{:.4f}") for measure in MEASURES},
    f"95% of {COMPARED}": between("ci", "{:.4f}"),
    "to float32": figure("difference", form="{:+.4f}"),
    "95% of that": between("difference_ci", "{:+.4f}"),
}
COST_COLUMNS: Columns = {
    "retrieval": figure("set"),
    "index": figure("form"),
    "bytes/vector": figure("bytes"),
    "index MB": figure("index_mb", form="{:,.2f}"),
    "build s": figure("build_seconds", form="{:,.2f}"),
    "queries/s, one by one": figure("queries_per_second", form="{:,.0f}"),
    "in one batch": figure("queries_per_second_batched", form="{:,.0f}"),
}
"""Measured on one thread."""


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


def tables(models: Sequence[Row]) -> str:
    """Everything that models were measured on; each row is like results.json's, with `model` its name."""
    parts = [table(models)]
    if len(models) == 1 and "sts" in models[0]:
        parts.append(table(_sts_sets(models[0]), STS_COLUMNS))
    parts += [table(rows, columns) for rows, columns in measured(models)]
    return "\n\n".join(parts)


def measured(models: Sequence[Row]) -> Iterator[tuple[list[Row], Columns]]:
    """The rows and columns of retrieval, of its indices and of transfer, each where there is something of it."""
    named: Columns = {"model": figure("model")} if len(models) > 1 else {}
    for rows_of, columns in ((_forms, QUALITY_COLUMNS), (_indices, COST_COLUMNS), (_transfer_sets, TRANSFER_COLUMNS)):
        rows: list[Row] = [{"model": model["model"], **row} for model in models for row in rows_of(model)]
        filled = {name: cell for name, cell in {**named, **columns}.items() if any(cell(row) is not None for row in rows)}
        if rows:
            yield rows, filled


def comparison(first: str, second: str, rows: Sequence[Row]) -> str:
    """What compare() found of the models of these names."""
    columns: Columns = {
        "measure": figure("measure"),
        first: figure("first", form="{:.4f}"),
        second if second != first else f"{second} (2)": figure("second", form="{:.4f}"),
        "difference": figure("difference", form="{:+.4f}"),
        "95% interval": between("interval", "{:+.4f}"),
        "": figure("verdict"),
    }
    return table(rows, columns)


def _sts_sets(results: Row) -> list[Row]:
    scores = {name: score for name, score in results["sts"].items() if name != "AVG_OF"}
    return [{"set": name, "score": score, "ci": results["sts_ci"].get(name)} for name, score in scores.items()]


def _transfer_sets(results: Row) -> Iterator[Row]:
    for name, scores in results.get("transfer", {}).items():
        yield {"set": name, **scores, "ci": results["transfer_ci"][name].get("accuracy")}


def _forms(results: Row) -> Iterator[dict[str, Any]]:
    """Each set's default search, then its other forms with what they differ from it."""
    for name, scores in results.get("retrieval", {}).items():
        intervals, resampled = results["retrieval_ci"][name], results["retrieval_resamples"][name]
        yield {
            "set": name,
            "form": "float32 (numpy)",
            "bytes": results["bytes_per_vector"],
            "ci": intervals.get(COMPARED),
            **{measure: scores[measure] for measure in MEASURES},
        }
        for form, of_form in scores.items():
            if not isinstance(of_form, Mapping):
                continue
            row = {"set": name, "form": form, **of_form, "ci": intervals[form].get(COMPARED)}
            row["bytes"] = " + ".join(
                str(of_form[key]) for key in ("bytes_per_vector", "rescore_bytes_per_vector") if key in of_form
            )
            row["index_mb"] = of_form["index_bytes"] / 1e6
            row["difference"] = of_form[COMPARED] - scores[COMPARED]
            if resampled[COMPARED]:
                row["difference_ci"] = difference(resampled[COMPARED], resampled[form][COMPARED])
            yield row


def _indices(results: Row) -> Iterator[Row]:
    return (row for row in _forms(results) if "index_bytes" in row)
