"""What the models reach, as the tables and charts of the page: from evaluate/results.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.evaluation.compare import compare
from distill.evaluation.report import measured
from distill.evaluation.retrieval import COMPARED
from distill.report.chart import Axis, Chart, Point, Series

TEACHER = "teacher"
PRECISIONS = ("float16", "int8", "binary")
Row = Mapping[str, Any]
Results = Mapping[str, Row]


@dataclass(frozen=True)
class Cell:
    text: str = "-"
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """rows: a name and its cells; the teacher's row is `teacher`."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class Figure:
    """A column of the result table. `better`: 1 if more is better, -1 if less is, 0 if neither."""

    name: str
    value: Callable[[Row], float | None]
    form: str
    better: int = 1
    interval: Callable[[Row], Sequence[float] | None] = lambda row: None


def inner(*keys: str) -> Callable[[Row], Any]:
    """row[key][key]..., None where it is not there."""

    def value(row: Row) -> Any:
        found: Any = row
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return value


STS = Figure("STS average", inner("sts", "AVG"), "{:.2f}", interval=inner("sts_ci", "AVG"))
NEAR = Figure("Spearman, 50 nearest", inner("fidelity", "spearman_top50"), "{:.3f}")
FIGURES = [
    Figure("parameters", inner("params"), "{:,}", -1),
    Figure("dimensions", inner("dim"), "{:,}", 0),
    Figure("bytes a vector", inner("bytes_per_vector"), "{:,}", -1),
    Figure("sentences a second", inner("sentences_per_second"), "{:,.0f}"),
    STS,
    Figure("STS to teacher", inner("to_teacher", "difference"), "{:+.2f}", 0, inner("to_teacher", "interval")),
    Figure("Spearman, all pairs", inner("fidelity", "spearman"), "{:.3f}"),
    NEAR,
    Figure("10 nearest shared", inner("fidelity", "top10"), "{:.3f}"),
]


def with_differences(results: Results) -> dict[str, dict[str, Any]]:
    """results, each student with `to_teacher`: its difference in the STS average, on the same resamples, if there is one."""
    rows = {name: dict(row) for name, row in results.items()}
    for name, row in rows.items():
        if name != TEACHER and "sts_resamples" in row and "sts_resamples" in results.get(TEACHER, {}):
            differences = {found["measure"]: found for found in compare(results[TEACHER], row)}
            row["to_teacher"] = differences["STS AVG"]
    return rows


def result_table(results: Results) -> Table:
    """A row for each model, the teacher's first; the best of the students in each column is marked."""
    return _table(FIGURES, with_differences(results))


def sets_table(results: Results) -> Table | None:
    """Every set that was measured, a column for each; None where there was none."""
    names = {kind: list(dict.fromkeys(name for row in results.values() for name in row.get(kind, {}))) for kind in SETS}
    figures = []
    for kind, (measure, form) in SETS.items():
        for name in names[kind]:
            if name in ("AVG", "AVG_OF"):
                continue
            keys = (name, *((measure,) if measure else ()))
            label = f"{name} {measure}" if measure else name
            figures.append(Figure(label, inner(kind, *keys), form, interval=inner(f"{kind}_ci", *keys)))
    return _table(figures, results) if figures else None


SETS = {"sts": ("", "{:.2f}"), "retrieval": ("ndcg@10", "{:.3f}"), "transfer": ("accuracy", "{:.3f}")}


def detail_tables(results: Results) -> list[Table]:
    """What the terminal's table says beyond these: retrieval by vectors and index, transfer."""
    tables = []
    for rows, columns in measured([{"model": name, **row} for name, row in results.items()]):
        named = {name: cell for name, cell in columns.items() if name != "model"}
        tables.append(Table(list(named), [(row["model"], [Cell(cell(row) or "-") for cell in named.values()]) for row in rows]))
    return tables


def _table(figures: Sequence[Figure], results: Results) -> Table:
    shown = [figure for figure in figures if any(figure.value(row) is not None for row in results.values())]
    best = {figure.name: _best(figure, results) for figure in shown}
    ordered = sorted(results, key=lambda name: name != TEACHER)
    rows = [(name, [_cell(figure, results[name], name in best[figure.name]) for figure in shown]) for name in ordered]
    return Table([figure.name for figure in shown], rows)


def _cell(figure: Figure, row: Row, best: bool) -> Cell:
    value, interval = figure.value(row), figure.interval(row)
    if value is None:
        return Cell()
    between = " to ".join(figure.form.format(end) for end in interval) if interval else ""
    return Cell(_signed(figure.form.format(value)), _signed(between), best)


def _best(figure: Figure, results: Results) -> set[str]:
    """The students whose figure, as it is shown, is the best; none where all show the same."""
    values = {name: figure.value(row) for name, row in results.items() if name != TEACHER}
    known = {name: value for name, value in values.items() if value is not None}
    shown = {name: figure.form.format(value) for name, value in known.items()}
    if not figure.better or len(set(shown.values())) < 2:
        return set()
    best = max(known, key=lambda name: figure.better * known[name])
    return {name for name, text in shown.items() if text == shown[best]}


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def quality_charts(results: Results) -> list[Chart]:
    """Quality against bytes a vector, and against speed."""
    quality, label = (STS, "STS average, Spearman x 100")
    if not any(STS.value(row) is not None for row in results.values()):
        quality, label = NEAR, "fidelity: Spearman, 50 nearest"
    rows = {name: row for name, row in results.items() if quality.value(row) is not None}
    if not rows:
        return []
    level = ("teacher", float(quality.value(rows[TEACHER]) or 0)) if TEACHER in rows else None
    charts = []
    for title, x, key, form in (
        ("Quality against bytes a vector", Axis("bytes a vector, float32", doubling=True), "bytes_per_vector", "{:,} bytes"),
        ("Quality against speed", Axis("sentences a second", zero=True), "sentences_per_second", "{:,.0f} a second"),
    ):
        if all(key in row for row in rows.values()):
            charts.append(Chart(title, x, Axis(label), _families(rows, quality, key, form), level=level))
    return charts


def small_vector_charts(results: Results) -> list[Chart]:
    """For each retrieval set that was searched with small vectors too: what each precision keeps, for its bytes."""
    charts = []
    for name in dict.fromkeys(name for row in results.values() for name in row.get("retrieval", {})):
        series = []
        for number, (model, row) in enumerate((model, row) for model, row in results.items() if model != TEACHER):
            if points := _precisions(model, row, name):
                series.append(Series(model, points, number))
        if any(len(each.points) > 1 for each in series):
            x, y = Axis("bytes a vector that is searched", doubling=True), Axis(f"{COMPARED} of exact search")
            reached = inner("retrieval", name, COMPARED)(results.get(TEACHER, {}))
            level = ("teacher, float32", reached) if reached is not None else None
            charts.append(Chart(f"{name}: quality against bytes a vector", x, y, series, level=level))
    return charts


def _precisions(model: str, row: Row, name: str) -> list[Point]:
    """A point for float32 and for each precision that was searched as it is, neither through a graph nor rescored."""
    scores, intervals = row.get("retrieval", {}).get(name), row.get("retrieval_ci", {}).get(name, {})
    if scores is None:
        return []
    forms = {"float32": (scores, intervals, row["bytes_per_vector"])}
    for form, of_form in scores.items():
        if form in PRECISIONS:
            forms[form] = (of_form, intervals[form], of_form["bytes_per_vector"])
    points = []
    for form, (found, between, size) in forms.items():
        title = f"{model}, {form}: {found[COMPARED]:.4f} at {size:,} bytes"
        points.append(Point(size, found[COMPARED], title, form, tuple(between[COMPARED]) if COMPARED in between else None))
    return sorted(points, key=lambda point: point.x)


def _families(results: Results, quality: Figure, key: str, form: str) -> list[Series]:
    """A series for each model. Its nested sizes are joined to it against bytes; they have its speed."""
    families: dict[str, list[str]] = {}
    for name in results:
        stem, _, size = name.rpartition("-")
        nested = size.isdigit() and stem in results
        if not nested or key == "bytes_per_vector":
            families.setdefault(stem if nested else name, []).append(name)
    series = []
    numbers = iter(range(len(families)))
    for family, members in families.items():
        points = []
        for name in members:
            row, value = results[name], float(quality.value(results[name]) or 0)
            interval = quality.interval(row)
            title = f"{name}: {quality.form.format(value)} at {form.format(row[key])}"
            label = str(row["dim"]) if len(members) > 1 else ""
            points.append(Point(row[key], value, title, label, (interval[0], interval[1]) if interval else None))
        number = None if family == TEACHER else next(numbers)
        series.append(Series(family, sorted(points, key=lambda point: point.x), number, line=len(members) > 1))
    return series


def headline(results: Results, student: str) -> list[tuple[str, str]]:
    """A few figures of one student, each with what it is: beside the teacher's where these were measured."""
    row, teacher = results[student], results.get(TEACHER, {})
    tiles = []
    quality = STS if STS.value(row) is not None else NEAR
    value, against = quality.value(row), quality.value(teacher)
    if value is not None:
        share = f", {value / against:.1%} of the teacher's {quality.form.format(against)}" if against else ""
        tiles.append((quality.form.format(value), quality.name + share))
    for key, unit, nicer, form in (
        ("bytes_per_vector", "bytes a vector", "smaller vectors", "{:,}"),
        ("params", "parameters", "fewer parameters", "{:,}"),
        ("sentences_per_second", "sentences a second", "as fast", "{:,.0f}"),
    ):
        value, against = row.get(key), teacher.get(key)
        times = 1.0 if not (value and against) else value / against if key == "sentences_per_second" else against / value
        beside = f", the teacher's {form.format(against)}" if against else ""
        if times >= NOTABLE and value:
            tiles.append((f"{times:.1f}\N{MULTIPLICATION SIGN} {nicer}", f"{form.format(value)} {unit}{beside}"))
        elif value:
            tiles.append((form.format(value), unit + beside))
    return tiles


NOTABLE = 1.05  # what is less than this times the teacher's is no gain to speak of
