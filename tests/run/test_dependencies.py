from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", name)[0]).lower()


def imported_packages() -> dict[str, set[str]]:
    """Top-level package -> the files of distill and launcher that import it, inside functions too."""
    found: dict[str, set[str]] = {}
    for path in [*ROOT.glob("distill/**/*.py"), *ROOT.glob("launcher/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | {"distill", "launcher"}}


def test_every_imported_package_is_declared():
    declared = {normalised(each) for each in PROJECT["dependencies"]}
    declared |= {normalised(each) for extra in PROJECT["optional-dependencies"].values() for each in extra}
    distributions = packages_distributions()
    undeclared = {
        package: sorted(files)
        for package, files in imported_packages().items()
        if not declared & {normalised(each) for each in distributions.get(package, [package])}
    }
    assert not undeclared


def test_every_dependency_has_a_lower_bound():
    assert not [each for each in PROJECT["dependencies"] if ">=" not in each]
