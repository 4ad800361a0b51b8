#!/usr/bin/env python3
"""Prints the strongly connected components of the import graph: of the packages, and of the modules. Prints nothing if none.

    python tests/import_cycles.py

Imports inside functions count too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import grimp


def package_of(module: str) -> str:
    """distill.training.loop -> distill.training; distill.config and launcher.train are packages of their own."""
    return ".".join(module.split(".")[:2])


def components(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports, of distill and launcher."""
    graph = grimp.build_graph("distill", "launcher", cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def package_graph(modules: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {package_of(module): set() for module in modules}
    for module, imported in modules.items():
        edges[package_of(module)] |= {package_of(other) for other in imported} - {package_of(module), "distill", "launcher"}
    return edges


def main() -> int:
    modules = import_graph()
    cycles = [*components(package_graph(modules)), *components(modules)]
    for cycle in cycles:
        print(" <-> ".join(cycle))
    return 1 if cycles else 0


if __name__ == "__main__":
    sys.exit(main())
