"""Charts of evaluate/results.json: quality against the size of a vector and against speed."""

from __future__ import annotations

from distill.evaluation.retrieval import COMPARED
from distill.metrics.results import ModelResults
from distill.report.charts import Chart, Point
from distill.report.result_tables import FIDELITY, SIZE, SPEED, STS, Results

PRECISIONS = ("float16", "int8", "binary")


def result_charts(results: Results) -> list[Chart]:
    """STS, or fidelity where no STS was measured, against size and speed; retrieval against size, in each precision."""
    quality, ylabel = STS, "STS average, Spearman x 100"
    if not any(STS.value(model) is not None for model in results.values()):
        quality, ylabel = FIDELITY, "fidelity: Spearman, 50 nearest"
    sizes: dict[str, list[Point]] = {}
    speeds: dict[str, list[Point]] = {}
    for name, model in results.items():
        value, interval = quality.value(model), quality.interval(model)
        stem, _, suffix = name.rpartition("-")
        is_nested_size = suffix.isdigit() and stem in results
        if value is not None:
            has_sizes = is_nested_size or any(other.startswith(f"{name}-") for other in results)
            label = str(model.dim) if has_sizes else ""
            sizes.setdefault(stem if is_nested_size else name, []).append(Point(SIZE.value(model) or 0, value, interval, label))
            if not is_nested_size:
                speeds[name] = [Point(SPEED.value(model) or 0, value, interval)]
    sizes = {name: sorted(points) for name, points in sizes.items()}
    charts = []
    if sizes:
        charts.append(Chart("Quality against bytes per vector", "bytes per vector, float32", ylabel, sizes, x_log2=True))
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
            interval = model.at("retrieval_ci", name, *keys, COMPARED)
            points.append(Point(size, value, interval, label))
    return sorted(points)
