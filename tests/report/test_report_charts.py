"""Charts as the SVG that they become: text, markers by place, ids, colours."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from distill.report.charts import Chart, Point

NAN = float("nan")


def inline(chart):
    return ElementTree.fromstring(chart.html())


def values(svg):
    """The elements that carry values: the texts shown on hover, each with the marker or bar it belongs to."""
    titled = [element for element in svg.iter() if element.tag != "svg" and element.find("title") is not None]
    return {element.find("title").text: element for element in titled}


def squares(**changes):
    points = [Point(10.0 * number, number**2 - 40, (number**2 - 60, number**2)) for number in range(1, 9)]
    return Chart("Squares", "tens", "squares", {"a": points, "b": points[:3]}, **changes)


def test_text_stays_text_and_every_value_can_be_read():
    svg = inline(squares(vline=("kept", 30)))
    texts = {element.text for element in svg.iter("text")}
    assert {"tens", "squares", "a", "b", "kept", "20"} <= texts
    assert svg.find("title").text == "Squares" and "b: -39 at 10; -36 at 20; -31 at 30." in svg.find("desc").text
    assert svg.get("aria-labelledby").split() == [svg.find("title").get("id"), svg.find("desc").get("id")]
    assert {"a: -39 at 10", "b: -31 at 30"} <= {*values(svg)}


def test_markers_lie_inside_the_chart_and_higher_values_higher():
    svg = inline(squares())
    _, _, width, height = map(float, svg.get("viewBox").split())
    places = [(float(marker.get("x")), float(marker.get("y"))) for text, marker in values(svg).items() if text.startswith("a")]
    assert len(places) == 8 and places == sorted(places, key=lambda place: (place[0], -place[1]))
    assert all(0 < x < width and 0 < y < height for x, y in places)


def test_series_differ_by_marker_and_dash_as_well_as_by_colour():
    labels = ["teacher", *map(str, range(12))]
    svg = inline(Chart("t", "x", "y", {label: [Point(0, number), Point(1, number)] for number, label in enumerate(labels)}))
    paths = {path.get("id"): path.get("d") for path in svg.iter("path") if path.get("id")}
    markers, lines = set(), set()
    for text, marker in values(svg).items():
        if text.endswith("at 0"):
            markers.add((paths[marker.get("href")[1:]], re.search(r"fill: ([^;]+)", marker.get("style"))[1]))
    for group in svg.iter("g"):
        if any(child.find("title") is not None for child in group.iter("use")) and group.find("path") is not None:
            lines.add(group.find("path").get("style"))
    assert len(markers) == len(lines) == len(labels)


def test_what_is_not_finite_is_left_out():
    points = [Point(1, NAN), Point(2, 5, (NAN, 6)), Point(float("inf"), 1)]
    svg = inline(Chart("t", "x", "y", {"it": points, "teacher": [Point(NAN, NAN)]}))
    assert list(values(svg)) == ["it: 5 at 2"]
    drawn = [attribute for element in svg.iter() for attribute in element.attrib.values()]
    assert not any("nan" in attribute or "inf" in attribute for attribute in drawn)


@pytest.mark.parametrize("x_log2", [False, True])
def test_a_chart_of_one_value_has_it_and_one_of_none_is_empty(x_log2):
    assert list(values(inline(Chart("one", "x", "y", {"it": [Point(5, 0)]}, x_log2=x_log2)))) == ["it: 0 at 5"]
    assert not values(inline(Chart("none", "x", "y", {"it": [Point(NAN, NAN)]}, x_log2=x_log2)))


def test_sizes_have_ticks_at_powers_of_two():
    svg = inline(Chart("t", "bytes", "y", {"it": [Point(128, 1), Point(1536, 2)]}, x_log2=True))
    assert {"128", "256", "512", "1,024"} <= {text.text for text in svg.iter("text")}


def test_values_that_are_nearly_equal_do_not_fill_the_chart():
    svg = inline(Chart("t", "x", "y", {"it": [Point(0, 0.9999), Point(1, 0.9998)]}))
    first, second = (float(marker.get("y")) for marker in values(svg).values())
    assert 0 < second - first < 5


def test_bars_are_as_high_as_their_counts():
    svg = inline(Chart("t", "x", "y", bars=[(0, 5, 10), (5, 10, 40), (10, 11, 20)]))
    heights = {}
    for text, bar in values(svg).items():
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar.find("path").get("d"))]
        heights[text] = max(ys) - min(ys)
    assert list(heights) == ["1 to 5: 10", "6 to 10: 40", "11: 20"]
    assert heights["6 to 10: 40"] == pytest.approx(4 * heights["1 to 5: 10"], abs=0.5)


def test_names_are_only_text():
    label = "<i>$x$ \\frac{ #0072b2 _é"
    chart = Chart("</title><script>", "<b>", "&", {label: [Point(1, 1, None, "<s>")], "_b": [Point(2, 2)]})
    svg = inline(chart)
    assert {element.tag for element in svg.iter()} == {
        "svg",
        "title",
        "desc",
        "defs",
        "g",
        "path",
        "use",
        "text",
        "clipPath",
        "rect",
    }
    assert {label, "_b", "<b>", "&", "<s>"} <= {element.text for element in svg.iter("text")}


def test_a_page_has_each_id_once_and_colours_that_follow_its_mode():
    svgs = [inline(squares()), inline(Chart("Others", "x", "y", {"a": [Point(1, 1)], "b": [Point(2, 1)]}))]
    ids = [element.get("id") for svg in svgs for element in svg.iter() if element.get("id")]
    assert len(ids) == len({*ids})
    attributes = [attribute for svg in svgs for element in svg.iter() for attribute in element.attrib.values()]
    assert {link[1:] for link in attributes if re.fullmatch("#.+", link)} <= {*ids}
    assert not any(re.search("#[0-9a-f]{6}|http", attribute) for attribute in attributes)


def test_a_file_is_whole_and_equal_charts_have_equal_bytes():
    first, again = squares().svg(), squares().svg()
    assert first == again and ElementTree.fromstring(first).tag.endswith("svg")


def test_of_points_on_one_spot_the_later_ones_are_larger_and_hollow_so_that_all_are_visible():
    """A chart of three series whose points nearly coincide, and of one whose points are elsewhere."""
    same = {name: [Point(8, 0.5 + shift), Point(64, 0.7)] for name, shift in (("a", 0), ("b", 0.0001), ("c", -0.0001))}
    svg = inline(Chart("t", "x", "y", same | {"d": [Point(8, 0.9), Point(64, 1.5)]}, x_log2=True))
    paths = {path.get("id"): path for path in svg.iter("path") if path.get("id")}
    sizes, hollow = {}, {}
    for text, marker in values(svg).items():
        path = paths[marker.get("href")[1:]]
        numbers = [abs(float(number)) for number in re.findall(r"-?[0-9.]+", path.get("d"))]
        sizes[text[0]], hollow[text[0]] = max(numbers), "fill-opacity: 0" in marker.get("style")
    assert hollow == {"a": False, "b": True, "c": True, "d": False}
    assert sizes["a"] < sizes["b"] < sizes["c"] and len(values(svg)) == 8
