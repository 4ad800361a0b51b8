"""Tables of evaluate/results.json: a row for each model, the teacher first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.evaluation.compare import compare
from distill.evaluation.score_tables import detail_tables
from distill.metrics.results import TEACHER, Interval, ModelResults

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
Results = Mapping[str, ModelResults]


class Cell(NamedTuple):
    """`best`: of the students in its column."""

    text: str
    interval: Sequence[str] = ()
    best: bool = False


class Table(NamedTuple):
    """The first cell of a row is its header. num_left: the number of columns that are aligned to the left."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    num_left: int = 1


class Metric(NamedTuple):
    """`keys` lead to the value of a model. better: 1 if more is better, -1 if less is, 0 if neither."""

    name: str
    keys: tuple[str, ...]
    format: str
    better: int = 1

    def value(self, results: ModelResults) -> float | None:
        return results.at(*self.keys)

    def interval(self, results: ModelResults) -> Interval | None:
        """The 95% interval, which is stored beside the value: that of ("sts", "AVG") is ("sts_ci", "AVG")."""
        return results.at(f"{self.keys[0]}_ci", *self.keys[1:])

    def text(self, value: float) -> str:
        return self.format.format(value).replace("-", MINUS)

    def column(self, results: Results) -> list[Cell]:
        """A cell for each model. No student is marked as the best where all show the same."""
        values = {name: value for name, model in results.items() if (value := self.value(model)) is not None}
        students = [value for name, value in values.items() if name != TEACHER and math.isfinite(value)]
        best = None
        if self.better and len(set(map(self.text, students))) > 1:
            best = self.text(max(students, key=lambda value: self.better * value))
        cells = []
        for name, model in results.items():
            text = self.text(values[name]) if name in values else "-"
            interval = [self.text(end) for end in self.interval(model) or ()]
            cells.append(Cell(text, interval, best=text == best and name != TEACHER))
        return cells


PARAMS = Metric("parameters", ("params",), "{:,}", -1)
SIZE = Metric("bytes per vector", ("bytes_per_vector",), "{:,}", -1)
COSTS = [PARAMS, Metric("dimensions", ("dim",), "{:,}", 0), SIZE]
SPEED = Metric("texts per second", ("texts_per_second",), "{:,.0f}")
STS = Metric("STS average", ("sts", "AVG"), "{:.2f}")
STS_TO_TEACHER = Metric("STS to teacher", (), "{:+.2f}", 0)
FIDELITY_NAMES = {"spearman": "Spearman, all pairs", "spearman_top50": "Spearman, 50 nearest", "top10": "10 nearest shared"}
FIDELITY = {key: Metric(name, ("fidelity", key), "{:.3f}") for key, name in FIDELITY_NAMES.items()}
SET_METRICS = {"sts": ((), "{:.2f}"), "retrieval": (("ndcg@10",), "{:.3f}"), "transfer": (("accuracy",), "{:.3f}")}


def result_tables(results: Results) -> list[Table]:
    """All models; every set of the tasks; retrieval by type of vectors and index, and transfer."""
    results = {name: results[name] for name in sorted(results, key=lambda name: name != TEACHER)}
    columns = columns_of([*COSTS, SPEED, STS, *FIDELITY.values()], results)
    if any(differences := [_difference(name, results) for name in results]):
        columns[STS_TO_TEACHER] = [cell or Cell("-") for cell in differences]
    tables = [_table("Every model of the run, measured from the exported folders", columns, results)]
    if sets := columns_of([metric for metric in metrics_of_sets(results) if metric != STS], results):
        tables.append(_table("Set by set", sets, results))
    for found in detail_tables(results):
        header, body = list(found.header), [[cell or "-" for cell in row] for row in found.rows]
        if len(results) == 1:
            header, body = ["model", *header], [[*results, *row] for row in body]
        tables.append(Table(f"In detail: {header[1]}", header, body))
    return tables


def metrics_of_sets(results: Results) -> list[Metric]:
    """The metric of each set of each task, with STS among them."""
    metrics = []
    for task, (measure, form) in SET_METRICS.items():
        for name in dict.fromkeys(name for model in results.values() for name in model.at(task)):
            if name != "AVG_OF":
                metrics.append(STS if name == "AVG" else Metric(" ".join([name, *measure]), (task, name, *measure), form))
    return metrics


def columns_of(metrics: Sequence[Metric], results: Results) -> dict[Metric, list[Cell]]:
    """The cells of each metric that a model has a value of."""
    shown = [metric for metric in metrics if any(metric.value(model) is not None for model in results.values())]
    return {metric: metric.column(results) for metric in shown}


def sts_difference(first: ModelResults, second: ModelResults) -> tuple[float, float, float] | None:
    """The paired difference of the second STS average to the first, and its 95% interval; None where they cannot be paired."""
    if not (first.sts_resamples and second.sts_resamples):
        return None
    found = next(each for each in compare(first, second) if each.measure == "STS AVG")
    return (found.second - found.first, *found.interval) if found.interval else None


def full_size(name: str, results: Results) -> str:
    """The model that `name` is a nested size of; `name` itself if it is none."""
    stem, _, size = name.rpartition("-")
    return stem if size.isdigit() and stem in results else name


def headline(results: Results, student: str) -> list[tuple[str, str]]:
    """The main values of one student, each with what it is and the teacher's."""
    own, teacher = results[student], results.get(TEACHER)
    tiles = []
    for metric in (STS if STS.value(own) is not None else FIDELITY["spearman_top50"], SIZE, PARAMS, SPEED):
        value, reference = metric.value(own), metric.value(teacher) if teacher else None
        if value is not None:
            beside = f", {value / reference:.3g}{TIMES} the teacher's {metric.text(reference)}" if reference else ""
            tiles.append((metric.text(value), metric.name + beside))
    return tiles


def _difference(name: str, results: Results) -> Cell | None:
    found = sts_difference(results[TEACHER], results[name]) if TEACHER in results and name != TEACHER else None
    if found is None:
        return None
    difference, *interval = map(STS_TO_TEACHER.text, found)
    return Cell(difference, interval)


def _table(caption: str, columns: Mapping[Metric, Sequence[Cell]], results: Results) -> Table:
    header = ["model", *(metric.name for metric in columns)]
    return Table(caption, header, list(zip(results, *columns.values(), strict=True)))
