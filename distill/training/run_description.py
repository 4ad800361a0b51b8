"""What describes a stage in TensorBoard: its config, versions and command as text, and its row of the hparams table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary

from distill.run.collectives import world_size
from distill.run.files import read_json
from distill.run.session_log import device_name, versions
from distill.run.stage import RunContext
from distill.training.dashboard import layout, settings_row


def describe_run(
    context: RunContext, stage: str, settings: dict[str, Any], device: torch.device
) -> tuple[dict[str, str], list[Summary]]:
    """Markdown by name, and summaries. Of a sweep, the hparams columns that differ are the fields that were swept."""
    teacher = context.value("teacher.model")
    row = {"stage": stage, "ranks": world_size(), "teacher": teacher, **inherited_settings(context, settings)}
    return description(context.run_dir, device), [layout(), settings_row(row, f"{context.name}/{stage}")]


def inherited_settings(context: RunContext, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage and of those whose students it was trained from."""
    merged = dict(settings)
    for name in reversed(context.training_stages):
        begun = read_json(context.run_dir / name / "DONE.json")
        if begun is not None and any(section.get("init") == name for section in merged.values() if isinstance(section, dict)):
            merged = begun["settings"] | merged
    return merged


def description(run_dir: Path, device: torch.device) -> dict[str, str]:
    """The resolved config, the versions and the command, as Markdown by name."""
    made_with = versions() | {"ranks": str(world_size()), "device": device_name(device)}
    table = "\n".join(f"| {package} | {number} |" for package, number in made_with.items())
    config = run_dir / "config.yaml"
    return {
        "config": _block(config.read_text(encoding="utf-8") if config.is_file() else ""),
        "versions": f"| what | version |\n| --- | --- |\n{table}",
        "command": _block(" \\\n    ".join(shlex.quote(word) for word in [Path(sys.executable).name, *sys.orig_argv[1:]])),
    }


def _block(text: str) -> str:
    """Indented, so that Markdown leaves it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
