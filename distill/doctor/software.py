"""Versions, the project's own code and the config: the same on all nodes."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distill
from distill.doctor.context import Context
from distill.doctor.findings import Facts, Finding, Findings, Nodes, outliers, shorten
from distill.run.config import dump_config
from distill.run.files import sha256_of

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "webdataset")


def collect(context: Context) -> Facts:
    library = Path(distill.__file__).parent
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": _digests(library, "distill") | _digests(context.launcher, "launcher"),
        "config": hashlib.sha256(dump_config(context.config).encode()).hexdigest(),
        "executable": sys.executable,
        "root": str(library.parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digests(folder: Path, name: str) -> dict[str, str]:
    return {f"{name}/{path.relative_to(folder)}": sha256_of(path)[:12] for path in sorted(folder.rglob("*.py"))}


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for node, here, usual, where in outliers({node: facts["python"] for node, facts in nodes.items()}):
        fix = f"start it on {node} with Python {usual} (here it is {nodes[node]['executable']})"
        yield Finding(node, f"Python is {here} here, {usual} on {where}", fix)
    for package in PACKAGES:
        versions = {node: facts["packages"][package] for node, facts in nodes.items()}
        for node, here, usual, where in outliers(versions):
            fix = f"ssh {node} {nodes[node]['executable']} -m pip install {package}=={usual or here}"
            yield Finding(node, f"{package} is {here or 'missing'} here, {usual or 'missing'} on {where}", fix)
        for node in versions if not any(versions.values()) else ():
            yield Finding(node, f"{package} is not installed", f"{nodes[node]['executable']} -m pip install {package}")
    for node, here, usual, where in outliers({node: facts["code"] for node, facts in nodes.items()}):
        changed = shorten(sorted(path for path in here.keys() | usual.keys() if here.get(path) != usual.get(path)))
        fix = f"the same commit on all nodes, best in a folder that all see (on {node} it is {nodes[node]['root']})"
        yield Finding(node, f"the code differs from that of {where}: {changed}", fix)
    for node, _, _, where in outliers({node: facts["config"] for node, facts in nodes.items()}):
        yield Finding(node, f"the config is not the same as on {where}", "keep it in a folder that all nodes see")


def summarise(facts: Facts) -> str:
    return f"Python {facts['python']}, torch {facts['packages']['torch']}"
