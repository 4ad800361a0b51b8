"""Tables of evaluate/results.json: a row for each model, the teacher first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.evaluation.compare import compare
from distill.evaluation.score_tables import detail_tables
from distill.metrics.results import TEACHER, ModelResults

TIMES = "\N{MULTIPLICATION SIGN}"
Results = Mapping[str, ModelResults]


class Cell(NamedTuple):
    """`best`: of the students in its column."""

    text: str
    interval: str = ""
    best: bool = False


class Table(NamedTuple):
    """The first cell of a row is its header. num_left: the number of columns that are aligned to the left."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    num_left: int = 1


class Metric(NamedTuple):
    """A column: `keys` lead to the value of a model. better: 1 if more is better, -1 if less is, 0 if neither."""

    name: str
    keys: tuple[str, ...]
    format: str
    better: int = 1

    def value(self, results: ModelResults) -> float | None:
        return results.at(*self.keys)

    def interval(self, results: ModelResults) -> tuple[float, float] | None:
        """The 95% interval, which is stored beside the value: that of ("sts", "AVG") is ("sts_ci", "AVG")."""
        return results.at(f"{self.keys[0]}_ci", *self.keys[1:])

    def text(self, value: float) -> str:
        return _signed(value, self.format)

    def column(self, results: Results) -> list[Cell]:
        """A cell for each model. No student is marked as the best where all show the same."""
        values = {name: value for name, row in results.items() if (value := self.value(row)) is not None}
        students = [value for name, value in values.items() if name != TEACHER and math.isfinite(value)]
        best = None
        if self.better and len(set(map(self.text, students))) > 1:
            best = self.text(max(students, key=lambda value: self.better * value))
        cells = []
        for name, row in results.items():
            text = self.text(values[name]) if name in values else "-"
            interval = " to ".join(map(self.text, self.interval(row) or ()))
            cells.append(Cell(text, interval, best=text == best and name != TEACHER))
        return cells


def _signed(value: float, form: str) -> str:
    return form.format(value).replace("-", "\N{MINUS SIGN}")


PARAMS = Metric("parameters", ("params",), "{:,}", -1)
SIZE = Metric("bytes per vector", ("bytes_per_vector",), "{:,}", -1)
SPEED = Metric("texts per second", ("texts_per_second",), "{:,.0f}")
STS = Metric("STS average", ("sts", "AVG"), "{:.2f}")
FIDELITY = Metric("Spearman, 50 nearest", ("fidelity", "spearman_top50"), "{:.3f}")
METRICS = [
    PARAMS,
    Metric("dimensions", ("dim",), "{:,}", 0),
    SIZE,
    SPEED,
    STS,
    Metric("Spearman, all pairs", ("fidelity", "spearman"), "{:.3f}"),
    FIDELITY,
    Metric("10 nearest shared", ("fidelity", "top10"), "{:.3f}"),
]
SET_METRICS = {"sts": ((), "{:.2f}"), "retrieval": (("ndcg@10",), "{:.3f}"), "transfer": (("accuracy",), "{:.3f}")}


def result_tables(results: Results) -> list[Table]:
    """All models; every set of the tasks; retrieval by type of vectors and index, and transfer."""
    results = {name: results[name] for name in sorted(results, key=lambda name: name != TEACHER)}
    columns = _columns(METRICS, results)
    if any(differences := _differences(results)):
        columns["STS to teacher"] = [cell or Cell("-") for cell in differences]
    main = _table("Every model of the run, measured from the exported folders", columns, results)
    sets = _table("Set by set", _columns(_metrics_of_sets(results), results), results)
    tables = [main, sets] if len(sets.header) > 1 else [main]
    only = next(iter(results), "")
    for found in detail_tables(results):
        header, body = list(found.header), [[cell or "-" for cell in row] for row in found.rows]
        if len(results) == 1:
            header, body = ["model", *header], [[only, *row] for row in body]
        tables.append(Table(f"In detail: {header[1]}", header, body))
    return tables


def _differences(results: Results) -> list[Cell | None]:
    """Of each model, its paired difference to the teacher in the STS average; None where there is none."""
    cells: list[Cell | None] = []
    teacher = results.get(TEACHER)
    for name, student in results.items():
        cell = None
        if teacher is not None and name != TEACHER and teacher.sts_resamples and student.sts_resamples:
            found = next(each for each in compare(teacher, student) if each.measure == "STS AVG")
            if found.difference is not None and found.interval is not None:
                shown = [_signed(each, "{:+.2f}") for each in (found.difference, *found.interval)]
                cell = Cell(shown[0], " to ".join(shown[1:]))
        cells.append(cell)
    return cells


def _metrics_of_sets(results: Results) -> list[Metric]:
    metrics = []
    for task, (measure, form) in SET_METRICS.items():
        for name in dict.fromkeys(name for model in results.values() for name in model.at(task)):
            if name not in ("AVG", "AVG_OF"):
                metrics.append(Metric(" ".join([name, *measure]), (task, name, *measure), form))
    return metrics


def _columns(metrics: Sequence[Metric], results: Results) -> dict[str, list[Cell]]:
    """The cells of each metric that a model has a value of."""
    shown = [metric for metric in metrics if any(metric.value(model) is not None for model in results.values())]
    return {metric.name: metric.column(results) for metric in shown}


def _table(caption: str, columns: Mapping[str, Sequence[Cell]], results: Results) -> Table:
    return Table(caption, ["model", *columns], list(zip(results, *columns.values(), strict=True)))


def headline(results: Results, student: str) -> list[tuple[str, str]]:
    """The main values of one student, each with what it is and the teacher's."""
    own, teacher = results[student], results.get(TEACHER)
    tiles = []
    for metric in (STS if STS.value(own) is not None else FIDELITY, SIZE, PARAMS, SPEED):
        value, reference = metric.value(own), metric.value(teacher) if teacher else None
        if value is not None:
            beside = metric.name
            if reference:
                beside += f", {value / reference:.3g}{TIMES} the teacher's {metric.text(reference)}"
            tiles.append((metric.text(value), beside))
    return tiles
