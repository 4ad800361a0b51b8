from xml.etree import ElementTree

import pytest

from distill.report.chart import HEIGHT, LEFT, RIGHT, WIDTH, Axis, Chart, Point, Scale, Series, nice_ticks, number_text


def drawn(chart):
    return ElementTree.fromstring(chart.svg())


@pytest.mark.parametrize("low, high", [(0, 1), (0.9993, 0.9997), (-3, 412), (1e-6, 5e-5), (17, 18), (0, 123_456_789)])
def test_ticks_are_round_few_and_span_the_values(low, high):
    ticks, step = nice_ticks(low, high)
    assert ticks[0] <= low + step * 1e-6 and ticks[-1] >= high - step * 1e-6 and 3 <= len(ticks) <= 8
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert len({number_text(tick) for tick in ticks}) == len(ticks)


def test_doubling_axes_have_ticks_at_powers_of_two():
    scale = Scale(Axis("bytes", doubling=True), [128, 1536], 0, 100)
    assert scale.ticks == [128, 256, 512, 1024]
    assert scale(512) - scale(256) == pytest.approx(scale(256) - scale(128), abs=0.11)


@pytest.mark.parametrize("axis", [Axis("x"), Axis("x", zero=True), Axis("x", doubling=True)])
def test_one_value_is_drawn_too(axis):
    chart = Chart("one", axis, Axis("y"), [Series("it", [Point(5.0, 0.0)])])
    assert drawn(chart).find(".//circle") is not None


def test_what_is_not_finite_is_left_out():
    nan = float("nan")
    points = [Point(1, nan), Point(2, 5, interval=(nan, 6)), Point(float("inf"), 1)]
    svg = drawn(
        Chart("t", Axis("x"), Axis("y"), [Series("it", points), Series("none", [Point(nan, nan)], 1)], level=("so far", nan))
    )
    assert len(svg.findall(".//circle")) == 1 and svg.find(".//line[@class='interval']") is None
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode")
    assert drawn(Chart("t", Axis("x"), Axis("y"), [Series("it", [Point(nan, nan)])])).find(".//circle") is None


def test_everything_lies_inside_the_frame_and_is_named():
    points = [
        Point(10.0 * number, number**2 - 40, f"point {number}", interval=(number**2 - 60, number**2)) for number in range(1, 9)
    ]
    chart = Chart("squares", Axis("tens"), Axis("squares"), [Series("a", points), Series("b", points, 1)], level=("so far", 55))
    svg = drawn(chart)
    for circle in svg.iter("circle"):
        assert LEFT <= float(circle.get("cx")) <= WIDTH - RIGHT and 0 <= float(circle.get("cy")) <= HEIGHT
    assert [title.text for title in svg.iter("title")][:2] == ["squares", "point 1"]
    texts = [text.text for text in svg.iter("text")]
    assert {"tens", "squares", "so far"} <= {*texts}
    assert "from" not in svg.find("desc").text and "55" in svg.find("desc").text
    assert [name for _, name in chart.legend] == ["a", "b"]


def test_higher_values_are_drawn_higher():
    svg = drawn(Chart("t", Axis("x"), Axis("y"), [Series("it", [Point(0, 1), Point(1, 2)])]))
    first, second = svg.iter("circle")
    assert float(first.get("cy")) > float(second.get("cy")) and float(first.get("cx")) < float(second.get("cx"))


def test_bars_are_as_high_as_their_counts():
    svg = drawn(Chart("t", Axis("x", zero=True), Axis("y", zero=True), bars=[(0, 5, 10), (5, 10, 40), (10, 15, 0)]))
    heights = [float(bar.get("height")) for bar in svg.iter("rect")]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.5) and heights[2] == 0
    assert next(svg.iter("rect")).find("title").text == "0 to 5: 10"


def test_names_are_only_text():
    chart = Chart(
        "</title><script>", Axis("<b>"), Axis("&"), [Series("<i>", [Point(1, 1, "<u>", "<s>")]), Series("b", [Point(2, 2)])]
    )
    own = "svg title desc line text g circle polygon polyline"
    assert {element.tag for element in drawn(chart).iter()} <= {*own.split()}
    assert chart.id == "chart-title-script"
