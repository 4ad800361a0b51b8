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
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, StrMethodFormatter

STYLE = Path(__file__).with_name("chart.mplstyle")
WHITE, TEXT, MUTED, RULE = "#ffffff", "#1c1f23", "#5c636b", "#dde1e6"
SERIES = ("#0072b2", "#d55e00", "#008f68", "#b4588f", "#b07d00", "#3a9fd8")
CSS_VARIABLES = {WHITE: "--background", TEXT: "--text", MUTED: "--muted", RULE: "--rule"}
CSS_VARIABLES |= {color: f"--series-{number}" for number, color in enumerate(SERIES)}
MARKERS, DASHES = "os^Dv", ("-", "--", ":", "-.")  # cycles of different lengths: 60 series differ
TEACHER = "teacher"
MAX_MARKERS = 40  # points of a series; a longer one is a plain line
MAX_LEGEND_BELOW = 6  # series; a longer legend is beside the axes
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
        return _draw(self, {})

    def html(self) -> Markup:
        """Inline SVG for a page whose charts have different titles."""
        tooltips: dict[str, list[str]] = {}
        return _inline(self, _draw(self, tooltips), tooltips)

    @property
    def description(self) -> str:
        """The chart in words: every finite point of a short series, the first and last one of a long series."""
        parts = [f"{self.ylabel} against {self.xlabel}."]
        for label, points in self.series.items():
            shown = [point for point in points if math.isfinite(point.y)]
            shown = shown if len(shown) <= 8 else [shown[0], shown[-1]]
            values = "; ".join(f"{point.y:.4g} at {point.x:g}" for point in shown)
            parts.append(f"{label}: {values or 'no finite value'}.")
        return " ".join(parts)


def _draw(chart: Chart, tooltips: dict[str, list[str]]) -> bytes:
    """The SVG; adds to `tooltips`, by the id of an element, the texts of its markers."""
    file = io.BytesIO()
    with style.context(["default", STYLE, {"svg.hashsalt": chart.title}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a viewer has other fonts than those that the layout is measured with
        figure = Figure(figsize=chart.size, layout="constrained")
        axes = figure.add_subplot(xlabel=chart.xlabel, ylabel=chart.ylabel)
        for low, high, height in chart.bars:
            (bar,) = axes.bar(low, height, high - low, align="edge", color=SERIES[0], edgecolor=WHITE, linewidth=0.5)
            first, last = math.floor(low) + 1, math.floor(high)
            _add_tooltips(bar, [f"{first}{f' to {last}' if last > first else ''}: {height:,g}"], tooltips)
        students = [label for label in chart.series if label != TEACHER]
        lines = []
        for label, points in chart.series.items():
            number = students.index(label) if label in students else None
            lines.append(_plot(axes, label, points, number, tooltips))
        if chart.vline:
            axes.axvline(chart.vline[1], color=MUTED, linestyle="--", linewidth=1)
            axes.text(chart.vline[1], 1, chart.vline[0], transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        _scale(axes, chart)
        if len(lines) > MAX_LEGEND_BELOW:
            figure.legend(lines, list(chart.series), loc="outside right upper")
        elif len(lines) > 1:
            figure.legend(lines, list(chart.series), loc="outside lower center", ncols=2)
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": chart.title})
    return file.getvalue()


def _plot(axes: Axes, label: str, points: Sequence[Point], number: int | None, tooltips: dict[str, list[str]]) -> Line2D:
    """Adds a series in the style of its number, None for the teacher's."""
    finite = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    color = MUTED if number is None else SERIES[number % len(SERIES)]
    marker = "X" if number is None else MARKERS[number % len(MARKERS)]
    dash = DASHES[(number or 0) % len(DASHES)] if len(points) > 1 else ""
    xs, ys = [point.x for point in finite], [point.y for point in finite]
    (line,) = axes.plot(xs, ys, color=color, linestyle=dash, marker=marker if len(points) <= MAX_MARKERS else "")
    names = [f"{label} {point.label}".rstrip() for point in finite]
    _add_tooltips(line, [f"{name}: {y:,.6g} at {x:,.6g}" for name, x, y in zip(names, xs, ys, strict=True)], tooltips)
    for x, y, interval, beside in finite:
        if interval and all(map(math.isfinite, interval)):
            axes.vlines(x, *interval, color=color, linewidth=1)
        if beside:
            axes.annotate(beside, (x, y), (-4, 4), textcoords="offset points", ha="right", color=MUTED)
    if number is None and finite:
        axes.axhline(ys[-1], color=MUTED, linestyle="--", linewidth=1)
        axes.text(0.01, ys[-1], label, transform=axes.get_yaxis_transform(), va="bottom", color=MUTED)
    return line


def _add_tooltips(artist: Artist, texts: list[str], tooltips: dict[str, list[str]]) -> None:
    artist.set_gid(f"values-{len(tooltips)}")
    tooltips[f"values-{len(tooltips)}"] = texts


def _scale(axes: Axes, chart: Chart) -> None:
    low, high = axes.get_ylim()
    missing = MIN_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
    if chart.x_log2 and axes.dataLim.x1 > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=min(0, axes.dataLim.x0))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def _inline(chart: Chart, svg: bytes, tooltips: dict[str, list[str]]) -> Markup:
    """The SVG without namespaces, style sheet and ids of groups; with CSS colours, a description and tooltips."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style", "}title"))]:
            parent.remove(child)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "style" in element.attrib:
            element.set("style", re.sub("#[0-9a-f]{6}", _css_color, element.attrib["style"]))
        if element.tag == "g":  # its id is not unique in the page, those of markers and clip paths are
            texts = tooltips.get(element.attrib.pop("id", ""), [])
            markers = [child for child in element.iter() if child.tag.endswith("use")] or [element]
            for marker, text in zip(markers, texts, strict=False):
                ElementTree.SubElement(marker, "title").text = text
    name = "chart-" + re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")
    for position, tag, text in ((0, "title", chart.title), (1, "desc", chart.description)):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(position, element)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # safe: elements escape their text


def _css_color(found: re.Match[str]) -> str:
    return f"var({CSS_VARIABLES[found[0]]})" if found[0] in CSS_VARIABLES else found[0]
