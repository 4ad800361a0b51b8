"""What a run was made of, as text for TensorBoard: config, versions, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import distill
from distill.config import RunConfig, dump_config
from distill.training.distributed import world_size

PACKAGES = ("torch", "deepspeed", "transformers", "sentence-transformers", "numpy", "tensorboard")


def texts(config: RunConfig, device: torch.device) -> dict[str, str]:
    """Markdown by name."""
    versions = {"distill": f"{distill.__version__} ({revision() or 'no git revision'})", "python": platform.python_version()}
    versions |= {package: _version(package) for package in PACKAGES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} processor"
    versions |= {"ranks": str(world_size()), "device": name}
    table = "\n".join(f"| {package} | {number} |" for package, number in versions.items())
    return {
        "config": _block(dump_config(config)),
        "versions": f"| what | version |\n| --- | --- |\n{table}",
        "command": _block(" \\\n    ".join(shlex.quote(word) for word in [Path(sys.executable).name, *sys.orig_argv[1:]])),
    }


def revision() -> str | None:
    """The commit of the code that runs, with -dirty where files differ from it; None outside a git work tree."""
    root = Path(distill.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _block(text: str) -> str:
    """Indented, so that Markdown leaves it as it is, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
