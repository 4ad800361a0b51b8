"""A stage's loss and dev curves, as TensorBoard's own reader finds them in the run's event files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from distill.report.chart import Axis, Chart, Point, Series

MOST_POINTS = 300
DEV = {
    "dev/fidelity/": ("Fidelity on dev sentences", "agreement with the teacher, 1 is all"),
    "dev/sts/": ("STS on dev pairs", "Spearman x 100"),
}
NAMES = {
    "dev/fidelity/spearman": "Spearman, all pairs",
    "dev/fidelity/spearman_top50": "Spearman, 50 nearest",
    "dev/fidelity/top10": "10 nearest shared",
}
Curve = list[tuple[int, float]]


def read_curves(directory: Path) -> dict[str, Curve]:
    """(step, value) of each scalar of a stage, by its tag; values that are not finite are left out."""
    if not directory.is_dir():
        return {}
    from tensorboard.backend.event_processing import event_accumulator as events

    sizes = dict.fromkeys(events.DEFAULT_SIZE_GUIDANCE, 1) | {events.SCALARS: 0}  # 0: all of them
    reader = events.EventAccumulator(str(directory), size_guidance=sizes)
    reader.Reload()
    curves = {}
    for tag in reader.Tags()[events.SCALARS]:
        curves[tag] = [(event.step, event.value) for event in reader.Scalars(tag) if math.isfinite(event.value)]
    return curves


def stage_charts(name: str, curves: dict[str, Curve], results: dict[str, Any]) -> list[Chart]:
    """The loss, and a chart for each kind of dev figure. results: of the stage's DONE.json, with the step that was kept."""
    charts = []
    step = Axis("step", zero=True)
    if loss := curves.get("loss"):
        points, each = _thinned(loss)
        note = f"A point is the mean of {each} logged ones." if each > 1 else ""
        series = [Series("loss", points, markers=len(points) == 1)]
        charts.append(Chart(f"{name}: loss", step, Axis("loss"), series, note=note))
    best = results.get("best_step")
    for prefix, (title, label) in DEV.items():
        found = {tag: curve for tag, curve in curves.items() if tag.startswith(prefix) and curve}
        series = [
            Series(NAMES.get(tag, tag.removeprefix(prefix)), _thinned(curve)[0], number, markers=len(curve) <= 40)
            for number, (tag, curve) in enumerate(found.items())
        ]
        if series:
            charts.append(Chart(f"{name}: {title}", step, Axis(label), series, at=("kept", best) if best else None))
    return charts


def _thinned(curve: Curve) -> tuple[list[Point], int]:
    """At most MOST_POINTS points, each the mean of so many neighbours."""
    each = -(-len(curve) // MOST_POINTS)
    parts = [curve[start : start + each] for start in range(0, len(curve), each)]
    means = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    return [Point(step, value, f"step {step:,}: {value:.4g}") for step, value in means], each
