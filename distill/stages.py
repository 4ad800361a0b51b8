"""When a stage is done, and what makes it run again.

A stage is a function of (its part of the config, the fingerprints of its inputs). It writes one directory of the run:

    BEGUN.json    written first: config and inputs, so that a run that was killed goes on only as what it was
    DONE.json     written last: the same, with the results and the fingerprint of what was made

Nothing heavy is imported here: a finished pipeline says so within a second.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import TRAINING_STAGES, RunConfig, dump_config
from distill.files import publish, sha256_of, write_json

COSMETIC = frozenset(
    {"log_every", "keep", "save_every", "micro_batch", "tile", "queue_placement", "tasks", "placement", "max_memory"}
)
RESUMABLE = frozenset({"dev_every"})  # it decides which student is kept: a finished stage runs again, an unfinished one goes on


@dataclass(frozen=True)
class Stage:
    """A stage of one run: where it writes, what it depends on. `config` and `inputs` are JSON-able."""

    name: str
    directory: Path
    config: dict[str, Any]
    inputs: dict[str, str]
    product: Path | None = None  # a file outside of `directory` that a finished stage leaves

    def reason_to_run(self) -> str | None:
        """Why the stage must run, in words; None if it is done and nothing it depends on has changed."""
        done = read_json(self.directory / "DONE.json")
        if done is None:
            return "unfinished" if (self.directory / "BEGUN.json").exists() else "not run yet"
        changes = self.changes_since(done)
        if changes:
            return "; ".join(changes)
        if self.product is not None and not self.product.exists():
            return f"{self.product} is missing"  # taken out by `python -m distill.shards repair`, or by hand
        return None

    def changes_since(self, record: dict[str, Any], compare: Callable[[Any, Any], list[str]] | None = None) -> list[str]:
        """What differs between a BEGUN.json or DONE.json and the stage as it would run now."""
        changed = (compare or differences)(record["config"], self.config)
        changed += [f"input {name} changed" for name in sorted(self.inputs) if record["inputs"].get(name) != self.inputs[name]]
        return changed

    def begin(self) -> None:
        """Makes the directory ready: kept if it is this very stage unfinished, cleared if a finished one is to run again.

        Raises ValueError if it holds an unfinished stage of another config, and names what changed.
        """
        cleared = self.directory.with_name(f".{self.directory.name}.cleared")
        shutil.rmtree(cleared, ignore_errors=True)
        begun = read_json(self.directory / "BEGUN.json")
        if (self.directory / "DONE.json").exists() or (begun is None and self.directory.exists()):
            self.directory.rename(cleared)  # at once: a half-deleted stage would be taken for an unfinished one
            shutil.rmtree(cleared)
        elif begun is not None and (changes := self.changes_since(begun, compare=conflicts)):
            raise ValueError(
                f"{self.directory} holds an unfinished {self.name} of another config ({'; '.join(changes)}):"
                " put the config back to continue it, use another name=, or delete the directory"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / "BEGUN.json", {"stage": self.name, "config": self.config, "inputs": self.inputs})

    def finish(self, results: dict[str, Any], fingerprint: str) -> None:
        write_json(
            self.directory / "DONE.json",
            {
                "stage": self.name,
                "config": self.config,
                "inputs": self.inputs,
                "results": results,
                "fingerprint": fingerprint,
            },
        )


def stage_of(config: RunConfig, name: str) -> Stage:
    """The stage `name` of a run as its config and inputs are now. An input that is not there yet counts as ''."""
    run_dir = config.run_dir
    parts: dict[str, Any] = {"seed": config.seed}
    inputs: dict[str, str] = {}
    if name == "precompute":
        parts = {"text": config.text, "teacher": config.teacher, "shards": config.shards}
        inputs |= {path: f"{size} bytes" for path, size in source_files(config)}
    elif name in TRAINING_STAGES:
        section = getattr(config, name)
        parts |= {"student": config.student, name: section, "precision": config.engine.precision}
        parts |= {"evaluate": {"dev_sentences": config.evaluate.dev_sentences, "num_held_out": config.evaluate.num_held_out}}
        inputs["shards"] = _digest(config.shards_dir / "manifest.json")
        if name != "ckd" and section.init != "student":
            inputs[section.init] = fingerprint_of(run_dir / section.init)
        if name == "finetune" and section.triplets and Path(section.triplets).is_file():
            inputs[section.triplets] = f"{Path(section.triplets).stat().st_size} bytes"
    elif name == "export":
        parts |= {"export": config.export} if config.export.formats else {}  # without any, as ever
        inputs |= {stage: fingerprint_of(run_dir / stage) for stage in trained_stages(config)}
    elif name == "evaluate":
        parts |= {"evaluate": config.evaluate, "search": config.search, "sizes": config.hpd.nested}
        inputs |= {"export": fingerprint_of(run_dir / "export"), "shards": _digest(config.shards_dir / "manifest.json")}
    else:
        raise ValueError(f"no stage is called {name}")
    if name == "precompute":
        return Stage(name, config.precompute_dir, plain(parts), inputs, product=config.shards_dir / "manifest.json")
    return Stage(name, run_dir / name, plain(parts), inputs)


def trained_stages(config: RunConfig) -> list[str]:
    """The training stages of the pipeline, in their order."""
    return [stage for stage in config.stages if stage in TRAINING_STAGES]


def source_files(config: RunConfig) -> list[tuple[str, int]]:
    """The local files that the text and the vectors are read from, with their sizes in bytes."""
    patterns = [source.path for source in config.text.sources if source.path] + [config.teacher.vectors or ""]
    files = [path for pattern in patterns if pattern for path in _glob(pattern)]
    return [(str(path), path.stat().st_size) for path in files]


def fingerprint_of(directory: Path) -> str:
    """The fingerprint of what a finished stage made; '' if it is not finished."""
    done = read_json(directory / "DONE.json")
    return "" if done is None else done["fingerprint"]


def open_run(config: RunConfig) -> Path:
    """Creates the run directory and writes the resolved config into it. Raises OSError if nothing can be written there."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with publish(config.run_dir / "config.yaml") as file:
        file.write(dump_config(config).encode())
    return config.run_dir


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of a training stage that it could go on from, ascending."""
    complete = directory.glob("checkpoints/step-????????/COMPLETE.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in complete)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two JSON trees differ, as 'ckd.lr: 0.0002 -> 0.0001'."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]


def conflicts(old: Any, new: Any) -> list[str]:
    """The differences of two JSON trees with which a stage that was begun cannot go on."""
    return differences(_without(RESUMABLE, old), _without(RESUMABLE, new))


def _without(keys: frozenset[str], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without(keys, value) for key, value in tree.items() if key not in keys}
    return tree


def plain(parts: dict[str, Any]) -> dict[str, Any]:
    """Sections of a config, and JSON, as JSON, without what changes no result."""
    dumped = {key: part.model_dump(mode="json") if hasattr(part, "model_dump") else part for key, part in parts.items()}
    return json.loads(json.dumps(_without(COSMETIC, dumped)))


def _digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else ""


def _glob(pattern: str) -> list[Path]:
    """The files that `corpus` reads for a path or glob."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    return [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file()]  # noqa: PTH207
