"""Results as tables of text cells: for the terminal, and for the report, which shows the detail tables in its page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distill.evaluation.compare import Difference
from distill.evaluation.retrieval import COMPARED, MEASURES
from distill.metrics.bootstrap import paired_difference
from distill.metrics.results import ModelResults
from distill.run.formatting import format_table

Row = dict[str, str | None]


class Table(NamedTuple):
    """A cell that is None has no value."""

    header: list[str]
    rows: list[list[str | None]]

    def __str__(self) -> str:
        return format_table(self.header, self.rows)


def table_of(rows: Sequence[Row]) -> Table:
    """The keys of all rows as columns, in the order of their first appearance, without those that no row has a value for."""
    header = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) is not None for row in rows)]
    return Table(header, [[row.get(key) for key in header] for row in rows])


def cell(value: Any, form: str = "{}") -> str | None:
    """A value, or both ends of an interval as "low .. high", in a format; None for None."""
    if isinstance(value, tuple | list):
        return " .. ".join(form.format(end) for end in value)
    return None if value is None else form.format(value)


def format_results(models: Mapping[str, ModelResults]) -> str:
    """Everything that was measured, as tables for the terminal."""
    tables = [table_of([_model_row(name, results) for name, results in models.items()])]
    if len(models) == 1:
        tables += [table_of(rows) for results in models.values() if (rows := list(_sts_rows(results)))]
    return "\n\n".join(map(str, [*tables, *detail_tables(models)]))


def detail_tables(models: Mapping[str, ModelResults]) -> Iterator[Table]:
    """Quantised STS, retrieval, its index types, transfer, mteb and overlap, where there are any; several models by name."""
    for rows_of in (_quantised_rows, _retrieval_rows, _index_rows, _transfer_rows, _mteb_rows):
        rows = [
            {"model": name if len(models) > 1 else None, **row} for name, results in models.items() for row in rows_of(results)
        ]
        if rows:
            yield table_of(rows)
    if trained := next((results for results in models.values() if results.overlap), None):
        yield table_of(list(_overlap_rows(trained)))


def format_comparison(first: str, second: str, differences: Sequence[Difference]) -> str:
    """The differences of the models of these names."""
    rows = [
        {
            "measure": row.measure,
            first: cell(row.first, "{:.4f}"),
            second if second != first else f"{second} (2)": cell(row.second, "{:.4f}"),
            "difference": cell(row.difference, "{:+.4f}"),
            "95% interval": cell(row.interval, "{:+.4f}"),
            "": row.verdict,
        }
        for row in differences
    ]
    return str(table_of(rows))


def _model_row(name: str, results: ModelResults) -> Row:
    return {
        "model": name,
        "params": cell(results.params, "{:,}"),
        "dtype": cell(results.dtype),
        "dim": cell(results.dim),
        "bytes/vector": cell(results.bytes_per_vector),
        "texts/s": cell(results.texts_per_second, "{:,.0f}"),
        "STS avg": f"{results.sts['AVG']:.2f} ({len(results.at('sts', 'AVG_OF'))} sets)" if results.sts else None,
        "spearman": cell(results.at("fidelity", "spearman"), "{:.3f}"),
        "top-50": cell(results.at("fidelity", "spearman_top50"), "{:.3f}"),
        "top-10": cell(results.at("fidelity", "top10"), "{:.3f}"),
    }


def _sts_rows(results: ModelResults) -> Iterator[Row]:
    for name, score in results.sts.items():
        if name != "AVG_OF":
            within = cell(results.sts_ci.get(name), "{:.2f}")
            yield {"STS": name, "Spearman x 100": cell(score, "{:.2f}"), "95% interval": within}


def _quantised_rows(results: ModelResults) -> Iterator[Row]:
    for precision, scores in results.sts_quantised.items():
        row = {"STS": precision, "Spearman x 100": cell(scores["AVG"], "{:.2f}")}
        yield row | _to_float32(results, "STS AVG", f"STS AVG {precision}", "{:+.2f}")


def _retrieval_rows(results: ModelResults) -> Iterator[Row]:
    """Exact search of each set, then its index types with their difference to it."""
    for name, scores in results.retrieval.items():
        indices = {index: found for index, found in scores.items() if isinstance(found, dict)}
        found: Any
        for index, found in {"float32 (numpy)": scores, **indices}.items():
            keys = [index] if index in indices else []
            sizes = [found[key] for key in ("bytes_per_vector", "rescore_bytes_per_vector") if key in found]
            row = {
                "retrieval": name,
                "vectors": index,
                "bytes/vector": " + ".join(map(str, sizes)) or cell(results.bytes_per_vector),
                **{measure: cell(found[measure], "{:.4f}") for measure in MEASURES},
                f"{COMPARED} 95% interval": cell(results.at("retrieval_ci", name, *keys, COMPARED), "{:.4f}"),
            }
            if keys:
                row |= _to_float32(results, f"{name} {COMPARED}", f"{name} {index} {COMPARED}", "{:+.4f}")
            yield row


def _index_rows(results: ModelResults) -> Iterator[Row]:
    """Costs on one thread."""
    for name, scores in results.retrieval.items():
        for index, found in scores.items():
            if isinstance(found, dict):
                yield {
                    "retrieval": name,
                    "index": index,
                    "index MB": cell(found["index_bytes"] / 1e6, "{:,.2f}"),
                    "build s": cell(found["build_seconds"], "{:,.2f}"),
                    "queries/s, one by one": cell(found["queries_per_second"], "{:,.0f}"),
                    "in one batch": cell(found["queries_per_second_batched"], "{:,.0f}"),
                }


def _transfer_rows(results: ModelResults) -> Iterator[Row]:
    for name, scores in results.transfer.items():
        yield {
            "transfer": name,
            "accuracy": cell(scores["accuracy"], "{:.4f}"),
            "95% interval": cell(results.transfer_ci[name].get("accuracy"), "{:.4f}"),
            "majority": cell(scores["majority"], "{:.4f}"),
            "labels": cell(scores["labels"]),
            "tested": cell(scores["test"], "{:,}"),
        }


def _mteb_rows(results: ModelResults) -> Iterator[Row]:
    for name, score in results.mteb.items():
        yield {"mteb": name, "main score": cell(score, "{:.4f}")}


def _overlap_rows(results: ModelResults) -> Iterator[Row]:
    """The same for all students of a run."""
    for name, parts in results.overlap.items():
        for kind, overlap in parts.items():
            yield {"set": f"{name} {kind}", "distinct": f"{overlap.texts:,}", "in the training text": f"{overlap.found:,}"}


def _to_float32(results: ModelResults, whole: str, quantised: str, form: str) -> Row:
    """The paired difference of a quantised score to that of float32."""
    first, second = results.resamples[whole], results.resamples[quantised]
    return {
        "difference to float32": cell(second.score - first.score, form),
        "its 95% interval": cell(paired_difference(first, second), form),
    }
