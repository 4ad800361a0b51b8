"""Charts as SVG, drawn by matplotlib. Text stays text, and equal charts give equal bytes.

Series differ by colour, marker and dash. In a page, a chart takes its colours from CSS variables, so that it follows dark mode;
it has a title, a description in words, and the value of each marker and bar on hover.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, StrMethodFormatter

from distill.metrics.results import TEACHER

STYLE = Path(__file__).with_name("chart.mplstyle")
WHITE, TEXT, MUTED, RULE = "#ffffff", "#1c1f23", "#5c636b", "#dde1e6"
SERIES = ("#0072b2", "#d55e00", "#008f68", "#b4588f", "#b07d00", "#3a9fd8")
CSS_COLORS = {WHITE: "var(--background)", TEXT: "var(--text)", MUTED: "var(--muted)", RULE: "var(--rule)"}
CSS_COLORS |= {color: f"var(--series-{number})" for number, color in enumerate(SERIES)}
MARKERS, DASHES = "os^Dv", ("-", "--", ":", "-.")  # cycles of different lengths: 60 series differ
MAX_MARKERS = 40  # points of a series; a longer one is a plain line
MAX_LEGEND_BELOW = 6  # series; a longer legend is beside the axes
SAME_SPOT = 0.02  # of the width and height of the values: points that are nearer hide one another
MIN_SPAN = 0.01  # of the largest value: a narrower range of y is widened, so that noise does not fill a chart


class Point(NamedTuple):
    """`interval` is the range of y; `label` is shown beside the point."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """series: points by label; values that are not finite are left out. The teacher is grey, a line marks its last value.

    bars: (low, high, height) each, height the number of integers in (low, high]. vline: label and x of a reference line.
    x_log2: x is logarithmic with ticks at powers of 2. size: in inches.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    bars: Sequence[tuple[float, float, float]] = ()
    vline: tuple[str, float] | None = None
    x_log2: bool = False
    size: tuple[float, float] = (4.4, 2.9)

    def svg(self) -> bytes:
        """The content of a file."""
        file = io.BytesIO()
        with style.context(["default", STYLE, {"svg.hashsalt": self.title}]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a viewer has other fonts than those that the layout is measured with
            figure = Figure(figsize=self.size, layout="constrained")
            axes = figure.add_subplot(xlabel=self.xlabel, ylabel=self.ylabel)
            bars = [
                axes.bar(low, height, high - low, align="edge", color=SERIES[0], edgecolor=WHITE, linewidth=0.5)[0]
                for low, high, height in self.bars
            ]
            numbers, around = count(), _overlaps(list(self.series.values()), self.x_log2)
            lines = [
                _plot(axes, label, points, None if label == TEACHER else next(numbers), hidden)
                for (label, points), hidden in zip(self.series.items(), around, strict=True)
            ]
            for number, artist in enumerate([*bars, *lines]):
                artist.set_gid(f"values-{number}")
            if self.vline:
                axes.axvline(self.vline[1], color=MUTED, linestyle="--", linewidth=1)
                axes.text(self.vline[1], 1, self.vline[0], transform=axes.get_xaxis_transform(), ha="center", va="bottom")
            _scale(axes, self.x_log2)
            if len(lines) > MAX_LEGEND_BELOW:
                figure.legend(lines, list(self.series), loc="outside right upper")
            elif len(lines) > 1:
                figure.legend(lines, list(self.series), loc="outside lower center", ncols=2)
            figure.savefig(file, format="svg", metadata={"Date": None, "Title": self.title})
        return file.getvalue()

    def html(self) -> Markup:
        """Inline SVG for a page whose charts have different titles: with CSS colours, a description and tooltips.

        Without namespaces, style sheet and ids of groups.
        """
        root = ElementTree.fromstring(self.svg())
        tooltips = {f"values-{number}": texts for number, texts in enumerate(self.tooltips)}
        for element in list(root.iter()):
            for child in [child for child in element if child.tag.endswith(("}metadata", "}style", "}title"))]:
                element.remove(child)
            element.tag = element.tag.rpartition("}")[2]
            element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
            if colors := element.get("style"):
                element.set("style", re.sub("#[0-9a-f]{6}", lambda color: CSS_COLORS.get(color[0], color[0]), colors))
            if element.tag == "g":  # its id is not unique in the page, those of markers and clip paths are
                texts = tooltips.get(element.attrib.pop("id", ""), [])
                markers = [child for child in element.iter() if child.tag.endswith("use")] or [element]
                for marker, text in zip(markers, texts, strict=False):
                    ElementTree.SubElement(marker, "title").text = text
        name = "chart-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        for position, tag, text in ((0, "title", self.title), (1, "desc", self.description)):
            element = ElementTree.Element(tag, id=f"{name}-{tag}")
            element.text = text
            root.insert(position, element)
        root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
        return Markup(ElementTree.tostring(root, encoding="unicode"))  # safe: elements escape their text

    @property
    def description(self) -> str:
        """The chart in words: every point of a short series, the first and last one of a long series."""
        parts = [f"{self.ylabel} against {self.xlabel}."]
        for label, points in self.series.items():
            shown = _finite(points)
            shown = shown if len(shown) <= 8 else [shown[0], shown[-1]]
            values = "; ".join(f"{point.y:.4g} at {point.x:g}" for point in shown)
            parts.append(f"{label}: {values or 'no finite value'}.")
        return " ".join(parts)

    @property
    def tooltips(self) -> list[list[str]]:
        """The texts of the values of each bar, then of each series."""
        texts = []
        for low, high, height in self.bars:
            first, last = math.floor(low) + 1, math.floor(high)
            texts.append([f"{first}{f' to {last}' if last > first else ''}: {height:,g}"])
        for label, points in self.series.items():
            named = [(f"{label} {point.label}".rstrip(), point) for point in _finite(points)]
            texts.append([f"{name}: {point.y:,.6g} at {point.x:,.6g}" for name, point in named])
        return texts


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def _overlaps(series: Sequence[Sequence[Point]], x_log2: bool) -> list[int]:
    """How many series' markers lie around one another where a marker of each series would hide those of earlier ones."""
    places = [
        np.array([(math.log2(x) if x_log2 and x > 0 else x, y) for x, y, *_ in _finite(points)]).reshape(-1, 2)
        if len(points) <= MAX_MARKERS
        else np.empty((0, 2))
        for points in series
    ]
    every = np.concatenate([*places, np.empty((0, 2))])
    near = SAME_SPOT * (np.ptp(every, axis=0) if len(every) else np.zeros(2))
    found: list[int] = []
    for number, here in enumerate(places):
        below = [
            found[earlier] + 1
            for earlier, there in enumerate(places[:number])
            if (abs(here[:, None] - there[None]) <= near).all(axis=2).any()
        ]
        found.append(max(below, default=0))
    return found


def _plot(axes: Axes, label: str, points: Sequence[Point], number: int | None, hidden: int) -> Line2D:
    """Adds a series in the style of its number, None for the teacher's.

    hidden: how many series' markers it would hide; it then has larger, hollow markers around theirs.
    """
    finite = _finite(points)
    color, marker, dash = MUTED, "X", DASHES[0]
    if number is not None:
        color, marker, dash = (cycle[number % len(cycle)] for cycle in (SERIES, MARKERS, DASHES))
    dash, marker = dash if len(points) > 1 else "", marker if len(points) <= MAX_MARKERS else ""
    xs, ys = [point.x for point in finite], [point.y for point in finite]
    (line,) = axes.plot(xs, ys, color=color, linestyle=dash, marker=marker)
    if hidden:
        line.set(markersize=line.get_markersize() * (1 + 0.8 * hidden), markerfacecolor="none")
    for x, y, interval, beside in finite:
        if interval and all(map(math.isfinite, interval)):
            axes.vlines(x, *interval, color=color, linewidth=1)
        if beside:
            axes.annotate(beside, (x, y), (-4, 4), textcoords="offset points", ha="right", color=MUTED)
    if number is None and finite:
        axes.axhline(ys[-1], color=MUTED, linestyle="--", linewidth=1)
        axes.text(0.01, ys[-1], label, transform=axes.get_yaxis_transform(), va="bottom", color=MUTED)
    return line


def _scale(axes: Axes, x_log2: bool) -> None:
    low, high = axes.get_ylim()
    missing = MIN_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
    if x_log2 and axes.dataLim.x1 > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=min(0, axes.dataLim.x0))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
