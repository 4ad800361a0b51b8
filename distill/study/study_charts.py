"""Charts of a study: STS against the size of a vector, and against speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.metrics.quantise import Precision, bytes_per_vector
from distill.report.charts import Chart, Point
from distill.run.files import publish
from distill.study.study_rows import PRECISIONS, StudyRow

QUALITY = "STS average, Spearman x 100"
SIZE = (9.0, 4.5)  # inches


def write_charts(rows: Sequence[StudyRow], folder: Path) -> list[Path]:
    """Writes bytes.svg and speed.svg, the same bytes for equal rows; returns their paths."""
    charts = {
        "bytes.svg": Chart("Quality against size", "bytes per vector", QUALITY, _by_size(rows), x_log2=True, size=SIZE),
        "speed.svg": Chart("Quality against speed", "texts per second", QUALITY, _by_speed(rows), size=SIZE),
    }
    for name, chart in charts.items():
        with publish(folder / name) as file:
            file.write(chart.svg())
    return [folder / name for name in charts]


def _by_size(rows: Sequence[StudyRow]) -> dict[str, list[Point]]:
    """A line for each model that has smaller sizes and each precision, through the model's sizes."""
    series = {}
    for label, sizes in _families(rows).items():
        precisions: tuple[Precision, ...] = ("float32", *PRECISIONS)
        for precision in precisions:
            keys = ("sts",) if precision == "float32" else ("sts_quantised", precision)
            scores = [(row.results.dim, row.results.at(*keys, "AVG")) for row in sizes]
            points = [Point(bytes_per_vector(precision, dim), score) for dim, score in scores if score is not None]
            if points:
                series[f"{label}, {precision}"] = sorted(points)
    return series


def _by_speed(rows: Sequence[StudyRow]) -> dict[str, list[Point]]:
    """A point for each model at its full width."""
    smaller = {row.name for sizes in _families(rows).values() for row in sizes[1:]}
    timed = [row for row in rows if row.name not in smaller and row.results.texts_per_second]
    return {row.name: [Point(row.results.texts_per_second or 0, row.results.at("sts", "AVG"))] for row in timed}


def _families(rows: Sequence[StudyRow]) -> dict[str, list[StudyRow]]:
    """Each model that has smaller sizes with these, separately for nested ones and those by PCA."""
    families: dict[str, list[StudyRow]] = {}
    by_name = {row.name: row for row in rows}
    for row in rows:
        stem, _, size = row.name.rpartition("-")
        model = stem.removesuffix("-pca")
        if size == str(row.results.dim) and model in by_name:
            label = model if stem == model else f"{model}, PCA"
            families.setdefault(label, [by_name[model]]).append(row)
    return families
