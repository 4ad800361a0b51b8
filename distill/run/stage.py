"""A stage of a run: its dependencies, whether it is finished, and why it must run again.

A stage is a function of (the config fields it declares, its inputs, identified by their content). It writes one directory:

    BEGUN.json    written first: settings and inputs, so that a killed run continues only as what it was
    DONE.json     written last: the same, with the results and a fingerprint of what was made

A finished stage that is run again is kept as `.NAME.previous` beside its directory until the new run is finished, and put back
if the config is.

A stage is a subclass of Stage; distill/config.py lists them and gives each instance its RunContext.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from distill.run.config import Effect, Section, dump_config, settings
from distill.run.files import DigestCache, flush, publish, read_json, write_json

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=Section)
StopRequested = Callable[[int], bool]
CONFIG_DIGEST = "# the sha256 of the lines below, as the run wrote them: "
OUTSIDE = "outside.{}"  # in a stage's `previous`: a folder of its `outside`


def run_directory(runs_dir: Path, name: str) -> Path:
    """The directory of another run, given by its name under runs_dir or, with a slash, as a directory."""
    return Path(name) if "/" in name else runs_dir / name


@dataclass(frozen=True)
class RunContext:
    """The part of a run that a stage sees: directories, the seed, and the config sections that it declares in `reads`.

    shards_dir is another run's where `shards_from` names one. trained_stages: those whose students this run has or is to have.
    write_config: writes config.yaml of the run; called whenever a stage begins, so that a refused start leaves it as it is.
    """

    name: str
    run_dir: Path
    shards_dir: Path
    seed: int
    trained_stages: tuple[str, ...]
    sections: Mapping[str, Section]
    write_config: Callable[[], object] = lambda: None

    @property
    def precompute_dir(self) -> Path:
        return self.shards_dir.with_name("precompute")

    def value(self, path: str) -> Any:
        """The value of a field by "section.field"."""
        name, _, field = path.partition(".")
        return getattr(self.sections[name], field)

    def section(self, kind: type[S]) -> S:
        """The section of this class or of one derived from it. Raises LookupError if the stage does not declare it."""
        found = next((section for section in self.sections.values() if isinstance(section, kind)), None)
        if found is None:
            raise LookupError(f"{kind.__name__} is not among the sections that the stage reads: {sorted(self.sections)}")
        return found


class Stage(ABC):
    """One stage of one run.

    name: its directory under the run's, and its own config section where it has one.
    reads: further sections, or single fields of them as "section.field", that the stage depends on. A field that is not
    listed changes nothing for the stage.
    covered_by_inputs: sections that the stage uses but does not depend on, because the content of an input says the same.
    effects: dotted path -> effect, where it differs in this stage from what the field declares.
    uses_seed: whether the run's seed decides what is computed.
    kept_by_content: entries of its directory that name what they were computed from: valid whatever the config is.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    covered_by_inputs: ClassVar[tuple[str, ...]] = ()
    effects: ClassVar[Mapping[str, Effect]] = {}
    uses_seed: ClassVar[bool] = False
    kept_by_content: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: RunContext) -> None:
        self.context = context

    @property
    def directory(self) -> Path:
        """The only directory that the stage writes before its DONE.json, but for `outside`."""
        return self.context.run_dir / self.name

    @property
    def outside(self) -> tuple[Path, ...]:
        """Folders elsewhere in the run directory that belong to the stage, and are kept and put back with it."""
        return ()

    @property
    def lock_file(self) -> Path:
        """The file that whoever runs the stage holds a lock of."""
        return self.directory.with_name(f".{self.name}.lock")

    def progress(self) -> list[Path]:
        """What an unfinished stage has left in its directory that a later start continues from, if it is worth keeping."""
        return []

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Name -> fingerprint of the content of each input; '' for one that is not there yet."""

    @abstractmethod
    def run(self, device: torch.device, stop_requested: StopRequested = lambda step: False) -> bool:
        """Runs the stage, continuing an earlier call, and writes DONE.json; returns whether the stage is finished.

        stop_requested: called with the number of each training step; where it is true, `Stopped` is raised after a checkpoint.
        Raises ValueError for errors that a user can fix.
        """

    def is_product_missing(self) -> str | None:
        """Which product of the finished stage outside of `directory` is missing, in words; None if none is."""
        return None

    def settings(self, effect: Effect) -> dict[str, Any]:
        """The fields of this effect that the stage depends on, as a JSON tree by section."""
        tree: dict[str, Any] = {"seed": self.context.seed} if self.uses_seed and effect == "result" else {}
        for path in [self.name, *self.reads]:
            name, _, field = path.partition(".")
            if name not in self.context.sections:
                continue
            found = settings(self.context.sections[name], effect, f"{name}.", self.effects)
            if field:
                found = {key: value for key, value in found.items() if key == field}
            if found:
                tree[name] = tree.get(name, {}) | found
        return tree

    def reason_to_run(self) -> str | None:
        """Why the stage must run, in words; None if it is finished and nothing it depends on has changed.

        The finished stage before an unfinished one is put back first, if it is what would run now and nothing would be lost.
        """
        self._put_back()
        done = read_json(self.directory / "DONE.json")
        if done is None:
            return "unfinished" if (self.directory / "BEGUN.json").exists() else "not run yet"
        changes = self.changes_since(done)
        return "; ".join(changes) if changes else self.is_product_missing()

    def recorded_inputs(self) -> Mapping[str, str]:
        """The inputs of the stage that is begun or finished in the directory; {} if none is."""
        return self._last_record().get("inputs", {})

    def recorded_settings(self) -> Mapping[str, Any]:
        """The same of the settings, by section."""
        return self._last_record().get("settings", {})

    def _last_record(self) -> dict[str, Any]:
        return read_json(self.directory / "BEGUN.json") or read_json(self.directory / "DONE.json") or {}

    def changes_since(self, record: Mapping[str, Any]) -> list[str]:
        """Differences in result settings and inputs between a BEGUN.json or DONE.json and the stage as it would run now."""
        if "settings" not in record:
            return [f"{self.directory} was written by an earlier version of this program"]
        changed = differences(record["settings"], self.settings("result"))
        before, now = record["inputs"], self.inputs()
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                changed.append(f"input {name}: {_short(before.get(name))} -> {_short(now.get(name))}")
        return changed

    @property
    def previous(self) -> Path:
        """Where the finished stage lies while it is run again."""
        return self.directory.with_name(f".{self.directory.name}.previous")

    def refusal(self) -> str | None:
        """Why `begin` refuses, in words; None if it does not. A missing input is no reason: it may be made before."""
        begun = read_json(self.directory / "BEGUN.json")
        if begun is None or (self.directory / "DONE.json").exists() or not self.progress():
            return None
        missing = {f"input {name}: {_short(before)} -> nothing" for name, before in begun.get("inputs", {}).items()}
        if not (changes := [change for change in self.changes_since(begun) if change not in missing]):
            return None
        kept = f" (the finished one before it is kept in {self.previous})" if self.previous.exists() else ""
        return (
            f"{self.directory} holds an unfinished {self.name} of another config ({'; '.join(changes)}):"
            f" put the config back to continue it, use another name=, or delete the directory{kept}"
        )

    def begin(self) -> None:
        """Prepares the directory: kept if this stage is unfinished in it, moved to `previous` if it is finished there.

        Raises ValueError naming the changes if it holds progress of an unfinished stage of another config. Without a
        BEGUN.json only that progress is kept, which has its own record of what it is of.
        """
        if refusal := self.refusal():
            raise ValueError(refusal)
        begun = read_json(self.directory / "BEGUN.json")
        if (self.directory / "DONE.json").exists():
            _delete(self.previous)
            self.directory.rename(self.previous)
            for folder in self.outside:
                if folder.exists():
                    folder.rename(self.previous / OUTSIDE.format(folder.name))
            flush(self.previous.parent)
        elif self.directory.exists() and (begun is None or self.changes_since(begun)):
            self._clear()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.context.write_config()
        write_json(self.directory / "BEGUN.json", self._record())

    def _clear(self) -> None:
        """Deletes all but the progress, what is kept by its content, and what was damaged.

        BEGUN.json is deleted first, so that a kill in between leaves nothing that is taken for more.
        """
        begun = self.directory / "BEGUN.json"
        kept = self.progress()
        if kept and not begun.exists():
            logger.warning("%s has no BEGUN.json: only %s is kept", self.directory, ", ".join(path.name for path in kept))
        begun.unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path not in kept and path.name not in self.kept_by_content and path.suffix != ".damaged":
                _delete(path)

    def _put_back(self) -> None:
        if not self.previous.exists() or (self.directory / "DONE.json").exists() or self.progress():
            return
        done = read_json(self.previous / "DONE.json")
        if done is None or self.changes_since(done) or _is_locked(self.lock_file):
            return
        _delete(self.directory)
        for folder in self.outside:
            kept = self.previous / OUTSIDE.format(folder.name)
            if kept.exists():
                _delete(folder)
                kept.rename(folder)
        self.previous.rename(self.directory)
        flush(self.directory.parent)
        logger.info("%s: the finished one is put back: it is of this config", self.name)

    def finish(self, results: dict[str, Any], fingerprint: str, files: Mapping[str, str] | None = None) -> None:
        """Writes DONE.json: settings and inputs as they were when the stage began, results, the product's fingerprint.

        files: the sha256 of the product's files by name, by which one that has changed is named.
        """
        begun = read_json(self.directory / "BEGUN.json") or self._record()
        record = begun | {"results": results, "fingerprint": fingerprint}
        write_json(self.directory / "DONE.json", record | ({"files": dict(files)} if files is not None else {}))
        _delete(self.previous)

    @property
    def digests(self) -> DigestCache:
        """The sha256 of users' files, cached in the run directory."""
        return DigestCache(self.directory.with_name("input_digests.json"))

    def digest(self, path: Path) -> str:
        """The sha256 of a user's file; '' if there is none."""
        return self.digests.sha256(path) if path.is_file() else ""

    def _record(self) -> dict[str, Any]:
        record = {"stage": self.name, "settings": self.settings("result"), "selection": self.settings("selection")}
        return record | {"inputs": self.inputs()}


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _delete(directory: Path) -> None:
    """Deletes a directory or file so that a kill in between leaves nothing that looks like a stage."""
    deleted = directory.with_name(f".{directory.name.lstrip('.')}.deleted")
    shutil.rmtree(deleted, ignore_errors=True)
    if directory.is_symlink():
        directory.unlink()
    elif directory.is_dir():
        shutil.rmtree(directory.rename(deleted))
    else:
        directory.unlink(missing_ok=True)


def stage_fingerprint(directory: Path) -> str:
    """The fingerprint of a finished stage's product; '' if it is not finished."""
    done = read_json(directory / "DONE.json")
    return "" if done is None else done["fingerprint"]


def write_run_config(run_dir: Path, config: Section) -> None:
    """Writes the resolved config into the run directory, with its checksum."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = dump_config(config).encode()
    with publish(run_dir / "config.yaml") as file:
        file.write(f"{CONFIG_DIGEST}{hashlib.sha256(text).hexdigest()}\n".encode() + text)


def is_config_as_written(path: Path) -> bool:
    """Whether a file of `write_run_config` is what it wrote; True for one of an earlier version, without a checksum."""
    first, _, rest = path.read_bytes().partition(b"\n")
    expected = CONFIG_DIGEST + hashlib.sha256(rest).hexdigest()
    return first == expected.encode() or not first.startswith(CONFIG_DIGEST.encode())


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of a training stage that it could continue from, ascending."""
    complete = directory.glob("checkpoints/step-????????/COMPLETE.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in complete)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two JSON trees differ, as 'ckd.lr: 0.0002 -> 0.0001'."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(isinstance(each, dict) for each in old):
        pairs = zip(old, new, strict=True)  # a key that an earlier version did not have is that key with null, also in a list
        return [d for number, pair in enumerate(pairs) for d in differences(*pair, f"{where}[{number}]")]
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]


def _short(fingerprint: str | None) -> str:
    return (fingerprint or "nothing")[:12]
