"""Copies of a finished run for tests of the report: unchanged, and with hostile text in every file with text from outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.config import RunConfig, load_config
from distill.run.files import append_line, read_json, read_lines

HOSTILE = (
    "</q></script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'\"&<svg onload=alert(3)>\u202e"
)


def copy_of(finished: tuple[Path, Path, str], folder: Path) -> RunConfig:
    """The run in another folder; the files that its config names by their paths are those of the run itself."""
    config, directory, _ = finished
    shutil.copytree(directory, folder / directory.name)
    return load_config(config).model_copy(update={"runs_dir": folder})


def spoil(run: Path) -> None:
    change(run / "evaluate/neighbours.json", lambda found: [_spoil(each) for each in found["agree"] + found["differ"]])
    change(run / "precompute/text/manifest.json", lambda found: found["sources"][0].update(path=HOSTILE, name=HOSTILE))
    change(run / "evaluate/results.json", lambda found: found.update({HOSTILE: found["hpd"], f"{HOSTILE}-8": found["hpd-8"]}))
    change(run / "evaluate/results.json", lambda found: found["ckd"]["sts"].update({HOSTILE: 1.0}))
    for path in run.rglob("sessions.jsonl"):
        line = read_lines(path)[0]
        path.unlink()
        append_line(path, {**line, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}})


def change(path: Path, into: Callable[[dict[str, Any]], Any]) -> None:
    content = read_json(path)
    assert content is not None
    into(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def _spoil(example: dict[str, Any]) -> None:
    example["query"] = HOSTILE
    for side in ("teacher", "student"):
        for near in example[side]:
            near["text"] = HOSTILE
