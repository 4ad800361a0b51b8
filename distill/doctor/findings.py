"""Findings: what is wrong on which node, and how to fix it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]
Nodes = Mapping[str, Facts]  # by the node's name, rank 0's node first
MAX_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong on one node. A fault ends the run or falsifies its results; a warning does neither."""

    node: str
    what: str
    fix: str
    is_fault: bool = True
    check: str = ""


Findings = Iterator[Finding]


def warning(node: str, what: str, fix: str) -> Finding:
    return Finding(node, what, fix, is_fault=False)


def outliers(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """The nodes whose JSON-able value is not that of most: (node, its value, the usual value, nodes with the usual value).

    Of values that are equally frequent, the first node's is the usual one.
    """
    encoded = {node: json.dumps(value, sort_keys=True) for node, value in values.items()}
    for usual, _ in Counter(encoded.values()).most_common(1):
        having = [node for node, value in encoded.items() if value == usual]
        for node, value in encoded.items():
            if value != usual:
                yield node, values[node], values[having[0]], shorten(having)


def shorten(names: Iterable[str]) -> str:
    """n1, n2, n3 and 5 more"""
    listed = list(dict.fromkeys(names))
    more = len(listed) - MAX_NAMED
    return ", ".join(listed[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
