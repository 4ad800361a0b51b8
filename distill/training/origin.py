"""What a run was made of, as text for TensorBoard: config, versions, command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch

from distill.config import RunConfig, dump_config
from distill.sessions import device_name, versions
from distill.training.distributed import world_size


def texts(config: RunConfig, device: torch.device) -> dict[str, str]:
    """Markdown by name."""
    made_with = versions() | {"ranks": str(world_size()), "device": device_name(device)}
    table = "\n".join(f"| {package} | {number} |" for package, number in made_with.items())
    return {
        "config": _block(dump_config(config)),
        "versions": f"| what | version |\n| --- | --- |\n{table}",
        "command": _block(" \\\n    ".join(shlex.quote(word) for word in [Path(sys.executable).name, *sys.orig_argv[1:]])),
    }


def _block(text: str) -> str:
    """Indented, so that Markdown leaves it as it is, whatever is in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
