from __future__ import annotations

import pytest

from distill.run.formatting import format_bytes, format_duration, format_markdown_table, format_table


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1,000 kB"), (4.12e9, "4.12 GB"), (2.5e12, "2.5 TB")],
)
def test_bytes_have_decimal_units_and_three_digits(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1234, "0.123 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (9000, "2.5 h"), (3600 * 1234, "1,234 h")],
)
def test_durations_change_units_at_two_minutes_and_two_hours(seconds, text):
    assert format_duration(seconds) == text


def test_tables_align_the_first_column_left_and_numbers_right():
    assert format_table(["model", "dim"], [["a", "128"], ["teacher", None]]) == (
        "model    dim\n-------  ---\na        128\nteacher    -"
    )
    assert format_table(["a", "b"], [["x", "long"]], align="left") == "a  b\n-  ----\nx  long"


def test_markdown_tables_escape_the_column_separator():
    assert format_markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
