"""What nodes find of themselves, and what is wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]
Nodes = Mapping[str, Facts]  # by the node's name; rank 0's comes first
MOST_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong on one node. A fault ends the run, or falsifies it; a warning does neither."""

    node: str
    what: str
    fix: str
    is_fault: bool = True
    check: str = ""


Findings = Iterator[Finding]


def warning(node: str, what: str, fix: str) -> Finding:
    return Finding(node, what, fix, is_fault=False)


def odd_ones(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """The nodes whose JSON-able value is not that of most: (node, its value, the usual value, which nodes have that).

    Where as many nodes have one as the other, rank 0's is the usual one.
    """
    keys = {node: json.dumps(each, sort_keys=True) for node, each in values.items()}
    if not keys:
        return
    counts = Counter(keys.values())
    usual = max(counts, key=lambda key: counts[key])  # of equals, the first
    having = [node for node, key in keys.items() if key == usual]
    for node, key in keys.items():
        if key != usual:
            yield node, values[node], values[having[0]], names(having)


def names(nodes: Iterable[str]) -> str:
    """n1, n2 and 5 more"""
    listed = list(nodes)
    more = len(listed) - MOST_NAMED
    return ", ".join(listed[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def size(num_bytes: float) -> str:
    """12 MB, 3.4 GB"""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e6:.0f} MB"
