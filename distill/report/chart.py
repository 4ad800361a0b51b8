"""Charts as inline SVG: axes with ticks and labels, lines, points with intervals, bars. Colours are the page's (style.css).

A series differs from the others by its marker and its dashes as well as by its colour. A point says in a <title> what it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 46
NARROWEST = 0.01  # an axis spans at least this share of its values
MARKERS: list[list[tuple[float, float]]] = [  # corners around the middle
    [],  # a circle
    [(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)],
    [(0, -4.8), (4.6, 3.6), (-4.6, 3.6)],
    [(0, -5), (5, 0), (0, 5), (-5, 0)],
]
NUM_COLORS = 6


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str = ""
    label: str = ""  # written beside it
    interval: tuple[float, float] | None = None  # of y


@dataclass(frozen=True)
class Series:
    """`number` chooses colour, marker and dashes; None is the neutral one, which is the teacher's."""

    name: str
    points: Sequence[Point]
    number: int | None = 0
    line: bool = True
    markers: bool = True


@dataclass(frozen=True)
class Axis:
    """`doubling`: a logarithmic axis with ticks at powers of two. `zero`: it begins at 0."""

    label: str
    doubling: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Chart:
    """What there is to see. `level`: a name and a height of y to compare with; `at`: a name and a place of x."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    bars: Sequence[tuple[float, float, float]] = ()  # from and to on x, height
    level: tuple[str, float] | None = None
    at: tuple[str, float] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Leaves out what is not finite, such as the score of a student that has collapsed."""
        finite = [replace(series, points=list(filter(None, map(_finite, series.points)))) for series in self.series]
        object.__setattr__(self, "series", finite)
        if self.level and not math.isfinite(self.level[1]):
            object.__setattr__(self, "level", None)

    @property
    def id(self) -> str:
        """A name for the page's own links; titles are unique on it."""
        return "chart-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def svg(self) -> Markup:
        return Markup(tostring(_draw(self), encoding="unicode"))  # safe: elements escape their text

    @property
    def legend(self) -> list[tuple[Markup, str]]:
        """A key and a name for each series, where there is more than one."""
        if len(self.series) < 2:
            return []
        return [(Markup(tostring(_key(series), encoding="unicode")), series.name) for series in self.series]


def _finite(point: Point) -> Point | None:
    if not (math.isfinite(point.x) and math.isfinite(point.y)):
        return None
    return point if all(map(math.isfinite, point.interval or ())) else replace(point, interval=None)


class Scale:
    """From values low .. high to places start .. end; `rounded`: it spans whole ticks, else just the values."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float, *, rounded: bool = False) -> None:
        low, high = min(values), max(values)
        self._of: Callable[[float], float] = math.log2 if axis.doubling else float
        if axis.doubling:
            low, high = low / 1.2, high * 1.2
            self.ticks = _powers(low, high)
        else:
            low = 0.0 if axis.zero else low
            widened = max(0.0, NARROWEST * max(abs(low), abs(high), 1e-9) - (high - low)) / 2  # noise is not to fill a chart
            self.ticks, step = nice_ticks(low - (0.0 if axis.zero else widened), high + widened)
            if rounded:
                low, high = self.ticks[0], self.ticks[-1]
            elif widened:
                low, high = low - widened, high + widened
            self.ticks = [tick for tick in self.ticks if low - step / 1e6 <= tick <= high + step / 1e6]
        self._low, self._high, self._start, self._end = self._of(low), self._of(high), start, end

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)


def nice_ticks(low: float, high: float, wanted: int = 5) -> tuple[list[float], float]:
    """About `wanted` round values that span low .. high, and the step between them, 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)], step


def _powers(low: float, high: float) -> list[float]:
    exponents = list(range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))
    every = -(-len(exponents) // 6) or 1
    return [2.0**exponent for exponent in exponents[::every]] or [low, high]


def number_text(value: float) -> str:
    """A tick: 5e-4, 0.25, 1,000, 20k, 3M."""
    if 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:.6e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:,.10g}"


def _draw(chart: Chart) -> Element:
    name = chart.id
    svg = Element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")
    svg.set("aria-labelledby", f"{name}-title {name}-text")
    SubElement(svg, "title", id=f"{name}-title").text = chart.title
    SubElement(svg, "desc", id=f"{name}-text").text = _described(chart)
    points = [point for series in chart.series for point in series.points]
    xs = [point.x for point in points] + [edge for bar in chart.bars for edge in bar[:2]]
    ys = [y for point in points for y in (point.y, *(point.interval or ()))] + [bar[2] for bar in chart.bars]
    x = Scale(chart.x, xs or [1.0], LEFT + 8, WIDTH - RIGHT - 8)
    y = Scale(chart.y, ys + ([chart.level[1]] if chart.level else []) or [1.0], HEIGHT - BOTTOM, TOP + 8, rounded=True)
    _axes(svg, chart, x, y)
    for low, high, value in chart.bars:
        left, right, top = x(low), x(high), y(value)
        height = HEIGHT - BOTTOM - top
        bar = SubElement(svg, "rect", {"class": "bar c0"}, x=f"{left + 0.5}", y=f"{top}", height=f"{height:.1f}")
        bar.set("width", f"{max(0.5, right - left - 1):.1f}")
        SubElement(bar, "title").text = f"{low:g} to {high:g}: {value:,g}" if high - low != 1 else f"{high:g}: {value:,g}"
    if chart.level:
        _line(svg, "level", LEFT, y(chart.level[1]), WIDTH - RIGHT, y(chart.level[1]))
        _text(svg, LEFT + 6, y(chart.level[1]) - 5, chart.level[0], "start", "small")
    if chart.at:
        _line(svg, "level", x(chart.at[1]), TOP, x(chart.at[1]), HEIGHT - BOTTOM)
        aside, anchor = (-4, "end") if x(chart.at[1]) > WIDTH * 0.7 else (4, "start")
        _text(svg, x(chart.at[1]) + aside, TOP + 3, chart.at[0], anchor, "small")
    for series in chart.series:
        _series(svg, series, x, y)
    return svg


def _axes(svg: Element, chart: Chart, x: Scale, y: Scale) -> None:
    for tick in y.ticks:
        _line(svg, "grid", LEFT, y(tick), WIDTH - RIGHT, y(tick))
        _text(svg, LEFT - 6, y(tick) + 4, number_text(tick), "end")
    for tick in x.ticks:
        _line(svg, "tick", x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 4)
        _text(svg, x(tick), HEIGHT - BOTTOM + 17, number_text(tick), "middle")
    _line(svg, "axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x.label, "middle", "label")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    _text(svg, 12, middle, chart.y.label, "middle", "label").set("transform", f"rotate(-90 12 {middle})")


def _series(svg: Element, series: Series, x: Scale, y: Scale) -> None:
    group = SubElement(svg, "g", {"class": _color(series)})
    places = [(x(point.x), y(point.y)) for point in series.points]
    if series.line and len(places) > 1:
        SubElement(group, "polyline", {"class": "line"}, points=" ".join(f"{a:g},{b:g}" for a, b in places))
    for point, (a, b) in zip(series.points, places, strict=True):
        if point.interval:
            low, high = (y(end) for end in point.interval)
            _line(group, "interval", a, low, a, high)
        if series.markers:
            marker = _marker(group, series.number, a, b)
            SubElement(marker, "title").text = point.title
        if point.label:
            _text(svg, a - 6, b - 6, point.label, "end", "small")


def _key(series: Series) -> Element:
    """What stands before the name of a series in the legend."""
    svg = Element("svg", {"class": "key", "aria-hidden": "true"}, viewBox="0 0 24 12")
    group = SubElement(svg, "g", {"class": _color(series)})
    if series.line:
        SubElement(group, "polyline", {"class": "line"}, points="0,6 24,6")
    if series.markers:
        _marker(group, series.number, 12, 6)
    return svg


def _color(series: Series) -> str:
    return "neutral" if series.number is None else f"c{series.number % NUM_COLORS}"


def _marker(parent: Element, number: int | None, x: float, y: float) -> Element:
    corners = MARKERS[0 if number is None else number % len(MARKERS)]
    if not corners:
        return SubElement(parent, "circle", {"class": "marker"}, cx=f"{x:g}", cy=f"{y:g}", r="4")
    places = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return SubElement(parent, "polygon", {"class": "marker"}, points=places)


def _line(parent: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    SubElement(parent, "line", {"class": kind}, x1=f"{x1:g}", y1=f"{y1:g}", x2=f"{x2:g}", y2=f"{y2:g}")


def _text(parent: Element, x: float, y: float, text: str, anchor: str, kind: str = "") -> Element:
    element = SubElement(parent, "text", {"class": kind, "text-anchor": anchor} if kind else {"text-anchor": anchor})
    element.set("x", f"{x:g}")
    element.set("y", f"{y:g}")
    element.text = text
    return element


def _described(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    parts = [f"{chart.y.label} against {chart.x.label}."]
    for series in chart.series:
        if len(series.points) > 8:
            first, last = series.points[0], series.points[-1]
            parts.append(f"{series.name}: from {first.y:.4g} at {first.x:g} to {last.y:.4g} at {last.x:g}.")
        else:
            parts.append(f"{series.name}: {'; '.join(f'{point.y:.4g} at {point.x:g}' for point in series.points)}.")
    if chart.level:
        parts.append(f"{chart.level[0]}: {chart.level[1]:.4g}.")
    return " ".join(parts)
