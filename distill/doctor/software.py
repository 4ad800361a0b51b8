"""Versions, the project's own code and the config: the same on all nodes."""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distill
from distill.config import dump_config
from distill.doctor.findings import Facts, Finding, Findings, Nodes, odd_ones
from distill.doctor.start import Start
from distill.files import sha256_of

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "webdataset")
MOST_FILES = 4


def look(start: Start) -> Facts:
    library = Path(distill.__file__).parent
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": _digests(library, "distill") | _digests(start.launcher, "launcher"),
        "config": hashlib.sha256(dump_config(start.config).encode()).hexdigest()[:16],
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


def judge(start: Start, nodes: Nodes) -> Findings:
    for node, own, usual, where in odd_ones({node: facts["python"] for node, facts in nodes.items()}):
        fix = f"start it on {node} with the same Python {usual} (here it is {nodes[node]['executable']})"
        yield Finding(node, f"Python is {own} here, {usual} on {where}", fix)
    for package in PACKAGES:
        for node, own, usual, where in odd_ones({node: facts["packages"][package] for node, facts in nodes.items()}):
            fix = f"ssh {node} {nodes[node]['executable']} -m pip install {package}=={usual or own}"
            yield Finding(node, f"{package} is {own or 'missing'} here, {usual or 'missing'} on {where}", fix)
        for node, facts in nodes.items():
            if not any(each["packages"][package] for each in nodes.values()):
                yield Finding(node, f"{package} is not installed", f"{facts['executable']} -m pip install {package}")
    for node, own, usual, where in odd_ones({node: facts["code"] for node, facts in nodes.items()}):
        changed = sorted(path for path in own.keys() | usual.keys() if own.get(path) != usual.get(path))
        more = f" and {len(changed) - MOST_FILES} more" if len(changed) > MOST_FILES else ""
        fix = f"the same commit on all nodes, best in a folder that all see (on {node} it is {nodes[node]['root']})"
        yield Finding(node, f"the code differs from that of {where}: {', '.join(changed[:MOST_FILES])}{more}", fix)
    for node, _, _, where in odd_ones({node: facts["config"] for node, facts in nodes.items()}):
        yield Finding(node, f"the config says other things here than on {where}", "keep it in a folder that all nodes see")


def note(facts: Facts) -> str:
    return f"Python {facts['python']}, torch {facts['packages']['torch']}"
