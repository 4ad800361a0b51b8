"""Charts of evaluate/results.json: quality against the size of a vector and against speed."""

from __future__ import annotations

from collections import Counter

from distill.evaluation.retrieval import COMPARED
from distill.metrics.results import ModelResults
from distill.report.charts import Chart, Point
from distill.report.result_tables import FIDELITY, SIZE, SPEED, STS, Results, full_size

PRECISIONS = ("float16", "int8", "binary")


def result_charts(results: Results) -> list[Chart]:
    """STS, or fidelity where no STS was measured, against size and speed; retrieval against size, in each precision."""
    quality, ylabel = STS, "STS average, Spearman x 100"
    if not any(STS.value(model) is not None for model in results.values()):
        quality, ylabel = FIDELITY["spearman_top50"], "fidelity: Spearman, 50 nearest"
    num_sizes = Counter(full_size(name, results) for name in results)
    sizes: dict[str, list[Point]] = {}
    speeds: dict[str, list[Point]] = {}
    for name, model in results.items():
        value, interval, whole = quality.value(model), quality.interval(model), full_size(name, results)
        if value is not None:
            label = str(model.dim) if num_sizes[whole] > 1 else ""
            sizes.setdefault(whole, []).append(Point(model.bytes_per_vector, value, interval, label))
            if name == whole:
                speeds[name] = [Point(model.texts_per_second or 0, value, interval)]
    charts = []
    if sizes:
        sizes = {name: sorted(points) for name, points in sizes.items()}
        charts.append(Chart("Quality against bytes per vector", f"{SIZE.name}, float32", ylabel, sizes, x_log2=True))
        charts.append(Chart("Quality against speed", SPEED.name, ylabel, speeds))
    for name in dict.fromkeys(name for model in results.values() for name in model.retrieval):
        series = {label: points for label, model in results.items() if (points := _precisions(model, name))}
        if any(len(points) > 1 for points in series.values()):
            labels = ("bytes per vector that is searched", f"{COMPARED} of exact search")
            charts.append(Chart(f"{name}: quality against bytes per vector", *labels, series, x_log2=True))
    return charts


def _precisions(model: ModelResults, name: str) -> list[Point]:
    """A point for float32 and for each precision that was searched exactly and without rescoring, by size."""
    points = []
    for label, keys in (("float32", ()), *((precision, (precision,)) for precision in PRECISIONS)):
        value = model.at("retrieval", name, *keys, COMPARED)
        if value is not None:
            size = model.at("retrieval", name, *keys, "bytes_per_vector") if keys else model.bytes_per_vector
            points.append(Point(size, value, model.at("retrieval_ci", name, *keys, COMPARED), label))
    return sorted(points)
