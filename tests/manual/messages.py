"""Every string that the code can print, with a mark in place of its changing parts."""

from __future__ import annotations

import ast
from pathlib import Path

from commands import ROOT

MARK = "\0"


def strings_of(path: Path) -> list[str]:
    """The strings of a Python file, with MARK for each {expression}; the lines of any other file."""
    if path.suffix != ".py":
        return path.read_text(encoding="utf-8").splitlines()
    return [
        _text(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else MARK for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def all_strings() -> list[str]:
    files = [*(ROOT / "distill").rglob("*.py"), *(ROOT / "launcher").glob("*.py"), *(ROOT / "launcher").glob("*.sh")]
    return [text for path in sorted(files) for text in strings_of(path) if text]
