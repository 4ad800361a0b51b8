"""Tables, sizes and durations as text: the only formatters of the project."""

from __future__ import annotations

from collections.abc import Sequence

BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_bytes(num_bytes: float) -> str:
    """Bytes in decimal units with three significant digits: 4.1 GB."""
    scale, unit = next(((scale, unit) for scale, unit in BYTE_UNITS if num_bytes >= scale), (1.0, "B"))
    return f"{_three_digits(num_bytes / scale)} {unit}"


def format_duration(seconds: float) -> str:
    """Seconds as 12.3 s, 45 min or 3.5 h, with three significant digits."""
    if seconds < 120:
        return f"{_three_digits(seconds)} s"
    return f"{_three_digits(seconds / 60)} min" if seconds < 7200 else f"{_three_digits(seconds / 3600)} h"


def _three_digits(value: float) -> str:
    """Three significant digits, never with an exponent where the whole part is larger."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str | None]], *, align: str = "right") -> str:
    """An aligned plain-text table with a rule under its header; None is shown as "-".

    The first column is aligned to the left; the others to `align`, "left" or "right".
    """
    lines = [list(header), *([cell if cell is not None else "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    justify = [str.ljust, *([str.rjust if align == "right" else str.ljust] * (len(header) - 1))]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(justify, line, widths, strict=True)).rstrip() for line in lines
    )


def format_markdown_table(header: Sequence[str], rows: Sequence[Sequence[str | None]]) -> str:
    """The same as a Markdown table, columns after the first aligned to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)]]
    lines += [[(cell if cell is not None else "-").replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
