"""Charts of a training stage from its TensorBoard event files: loss, dev metrics, throughput."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from distill.report.charts import Chart, Point
from distill.report.result_tables import FIDELITY_NAMES

MAX_POINTS = 300  # of a curve; a longer one is shown as this number of means
PANELS = (  # title, y label, and labels of curves: {tag: label}, or {tag prefix ending in "/": prefix of the label}
    ("loss", "loss", {"loss": "loss", "reference_loss": "reference loss"}),
    ("fidelity on dev texts", "agreement with the teacher", {"dev/fidelity/": ""}),
    ("STS on dev pairs", "Spearman x 100", {"dev/sts/": "", "teacher/sts/": "teacher, "}),
    ("throughput", "texts per second", {"texts_per_second": "texts per second"}),
)
Curve = list[tuple[int, float]]


def read_curves(directory: Path) -> dict[str, Curve]:
    """(step, value) of each scalar of a stage, by its tag; values that are not finite are left out."""
    if not directory.is_dir():
        return {}
    from tensorboard.backend.event_processing import event_accumulator as events

    sizes = dict.fromkeys(events.DEFAULT_SIZE_GUIDANCE, 1) | {events.SCALARS: 0}  # 0: all of them
    reader = events.EventAccumulator(str(directory), size_guidance=sizes).Reload()
    curves = {}
    for tag in reader.Tags()[events.SCALARS]:
        curves[tag] = [(event.step, event.value) for event in reader.Scalars(tag) if math.isfinite(event.value)]
    return curves


def training_charts(stage: str, curves: dict[str, Curve], best_step: int | None) -> list[Chart]:
    """The PANELS that there are curves for; the step of the kept student is marked."""
    charts = []
    for title, ylabel, labels in PANELS:
        series = {}
        for tag, curve in curves.items():
            prefix = tag[: tag.rfind("/") + 1]
            name = tag[len(prefix) :]
            label = labels.get(tag) or (labels[prefix] + FIDELITY_NAMES.get(name, name) if prefix in labels else None)
            if label and curve:
                series[label] = _mean_points(curve)
        if series:
            kept = ("kept", best_step) if best_step else None
            charts.append(Chart(f"{stage}: {title}", "step", ylabel, series, vline=kept))
    return charts


def _mean_points(curve: Curve) -> list[Point]:
    """At most MAX_POINTS points, each the mean of neighbours at the step of the last one."""
    parts = np.array_split(np.array(curve), min(MAX_POINTS, len(curve)))
    return [Point(part[-1, 0], part[:, 1].mean()) for part in parts]
