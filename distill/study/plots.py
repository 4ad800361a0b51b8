"""A study's results as pictures: what a vector costs, what a model costs, and what each is worth."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.files import publish

Row = Mapping[str, Any]
STYLE = {"svg.hashsalt": "distill", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
MARKERS = {"float32": "o", "int8": "s", "binary": "^"}


def require_matplotlib() -> None:
    """Raises ValueError that says what to install where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the plots of a study need matplotlib: bash launcher/install.sh quickstart,study")


def draw(results: Sequence[Row], folder: Path) -> list[Path]:
    """Writes bytes.svg, quality against bytes a vector, and speed.svg, against sentences a second. The same results give the
    same bytes."""
    require_matplotlib()
    pyplot = importlib.import_module("matplotlib.pyplot")
    paths = []
    for name, plot in (("bytes.svg", _bytes), ("speed.svg", _speed)):
        with pyplot.style.context(["tableau-colorblind10", STYLE]):
            drawing, axes = pyplot.subplots(figsize=(7.5, 4.5))
            plot(axes, results)
            axes.set_ylabel("STS average, Spearman x 100")
            paths.append(folder / name)
            with publish(paths[-1]) as file:
                drawing.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
            pyplot.close(drawing)
    return paths


def _bytes(axes: Any, results: Sequence[Row]) -> None:
    """A line for each model that was compressed, through its sizes, for each precision."""
    for label, rows in _compressed(results).items():
        color = None
        for precision, marker in MARKERS.items():
            forms = sorted((row["forms"][precision] for row in rows), key=lambda form: form["bytes_per_vector"])
            x, y = [form["bytes_per_vector"] for form in forms], [form["sts"]["AVG"] for form in forms]
            (line,) = axes.plot(x, y, marker=marker, markersize=5, linewidth=1, color=color, label=label if not color else None)
            color = line.get_color()
    for precision, marker in MARKERS.items():
        axes.plot([], [], marker=marker, markersize=5, linestyle="", color="gray", label=precision)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("bytes a vector")
    axes.legend(frameon=False, fontsize=8)


def _speed(axes: Any, results: Sequence[Row]) -> None:
    """A point for every model at its own width."""
    timed = [row for row in results if row["sentences_per_second"] and not row["shortened"]]
    for number, row in enumerate(timed):
        at = row["sentences_per_second"], row["forms"]["float32"]["sts"]["AVG"]
        axes.scatter(*at, s=30, label=row["model"], marker="osD^v"[number // 10 % 5])  # ten colours, then another marker
    axes.set_xlim(left=0)
    axes.set_xlabel("sentences a second")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _compressed(results: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each family; that of a PCA begins with the vectors that it is of."""
    by_name = {row["model"]: row for row in results}
    found: dict[str, list[Row]] = {}
    for row in results:
        if row["family"]:
            whole = [by_name[row["origin"]]] if row["shortened"] and row["family"] not in found else []
            found.setdefault(row["family"], whole).append(row)
    return found
