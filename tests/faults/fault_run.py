"""A small run whose stages are started one by one, in forks of this process, and what is compared of it at the end."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from commands import call
from conftest import sentences, write_pairs
from curves import events_of, points_of
from file_calls import kill_at, record
from retrieval_sets import write_folder

STAGES = {
    "text": ("precompute.py", "--text-only"),
    "precompute": ("precompute.py",),
    "ckd": ("train.py", "stage=ckd"),
    "finetune": ("train.py", "stage=finetune"),
    "hpd": ("train.py", "stage=hpd"),
    "export": ("export.py",),
    "evaluate": ("evaluate.py",),
    "report": ("pipeline.py",),
}
SETTINGS = """
name: tiny
runs_dir: {folder}/runs
text: {{sources: [{{type: file, path: {folder}/text.txt}}]}}
teacher: {{model: {encoder}, pooling: mean, max_length: 32, precision: fp32}}
shards: {{rows: 150, block_rows: 64}}
student: {{layers: [0, 2], max_length: 32}}
ckd: {{global_batch: 32, micro_batch: 8, queue: 128, max_steps: 6, dev_every: 2, save_every: 2, log_every: 1, lr: 1.0e-3,
       weights: {{ckd: 1.0, cosine: 1.0, congen: 0.5}}}}
finetune: {{global_batch: 16, micro_batch: 16, num_mined: 64, positive_range: [-1, 1], negative_rank: 20, max_steps: 4,
            dev_every: 2, save_every: 2}}
hpd: {{dim: 16, nested: [], global_batch: 32, micro_batch: 16, max_steps: 4, dev_every: 2, save_every: 2, freeze_encoder: true}}
engine: {{num_ranks: 1, precision: fp32, timeout: 60}}
export: {{formats: [onnx, onnx-int8]}}
evaluate: {{sts: {folder}/sts, retrieval: [{folder}/retrieval]}}
"""
# what differs between two runs that nobody disturbed: times, machines, identities of files
MEASURED = re.compile(r"seconds|per_second|host|pid|ended|last_task|energy|joules|self|memory|duration|started|/time|mfu")
NOT_COMPARED = re.compile(r"^(logs|tensorboard)/|\.lock$|\.tasks$|(tasks|sessions)\.jsonl$|input_digests\.json$")
WAIT = 30.0  # seconds that a start may be longer after a process of this machine was killed


@dataclass
class FaultRun:
    """A run directory, in which stages are started, killed and finished.

    `reach(stage)` makes it what it is before a stage, from a copy in `kept`; expected[stage] is its end state after the stage,
    calls[stage] the number of the stage's calls of each kind, seconds[stage] its duration: of the start that nobody disturbed.
    """

    config: Path
    run_dir: Path
    kept: Path
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self, stage: str, before: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a stage's command in a fork of this process."""
        script, *arguments = STAGES[stage]
        return call(script, "--config", self.config, *arguments, before=before)

    def reach(self, stage: str) -> None:
        """Makes the run directory what it is before `stage`, after an undisturbed start of every stage before it."""
        names = [*STAGES, "end"]
        for name, following in pairwise(names):
            if name == stage:
                break
            if name not in self.expected:
                self.reach(name)
                self._finish(name)
                shutil.copytree(self.run_dir, self.kept / following, symlinks=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if stage != "text":
            shutil.copytree(self.kept / stage, self.run_dir, symlinks=True)

    def expect(self, stage: str) -> None:
        """Measures what `stage` does and leaves behind where nobody disturbs it."""
        self.reach([*STAGES, "end"][list(STAGES).index(stage) + 1])

    def _finish(self, stage: str) -> None:
        calls, started = self.kept / f"{stage}.calls", time.monotonic()
        done = self.start(stage, before=record(self.run_dir, calls))
        assert done.returncode == 0, done.stdout
        self.seconds[stage] = time.monotonic() - started
        self.calls[stage] = Counter(calls.read_text().splitlines())
        self.expected[stage] = end_state(self.run_dir)

    def kill(self, stage: str, kind: str, number: int) -> None:
        """Starts a stage that is killed before its call `number` of this kind."""
        killed = self.start(stage, before=kill_at(self.run_dir, kind, number))
        assert killed.returncode == -9, f"{stage} made no call {number} of {kind!r}: {killed.stdout}"

    def problems(self, stage: str) -> list[str]:
        """Starts a stage once more; what is wrong then: its exit code, its duration, what it left behind."""
        started = time.monotonic()
        done = self.start(stage)
        seconds = time.monotonic() - started
        if done.returncode:
            return [f"exit code {done.returncode}: {done.stdout}"]
        found = differing(end_state(self.run_dir), self.expected[stage])
        return found + ([f"{seconds:.0f} s"] if seconds > self.seconds[stage] * 2 + WAIT else [])


def make_run(folder: Path, encoder: Path) -> FaultRun:
    """The run's config, text and evaluation sets; nothing is started."""
    write_pairs(folder / "sts")
    documents = [(f"d{number}", "", text) for number, text in enumerate(sentences(20, seed=3))]
    queries = [(f"q{number}", text) for number, text in enumerate(sentences(5, seed=4))]
    qrels = "".join(f"q{number}\td{3 * number}\t1\n" for number in range(5))
    write_folder(folder / "retrieval", qrels, documents=documents, queries=queries)
    (folder / "text.txt").write_text("\n".join(sentences(300)) + "\n")
    config, kept = folder / "run.yaml", folder / "kept"
    config.write_text(SETTINGS.format(folder=folder, encoder=encoder))
    kept.mkdir()
    return FaultRun(config, folder / "runs/tiny", kept)


def end_state(run_dir: Path) -> dict[str, Any]:
    """Relative path -> what must be the same after any fault: a sha256, JSON without measurements, TensorBoard's points."""
    state: dict[str, Any] = {}
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        name = str(path.relative_to(run_dir))
        if NOT_COMPARED.search(name):
            continue
        if path.suffix == ".json" and (read := _json(path)) is not None:
            state[name] = without_measurements(read)
            if name == "evaluate/DONE.json":
                del state[name]["fingerprint"]  # of results with their throughput
        elif path.suffix in (".html", ".md", ".txt") and "text/" not in name:
            state[name] = "present"
        else:
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for events in sorted((run_dir / "tensorboard").glob("*")):
        state[f"tensorboard/{events.name}"] = points_of(events_of(run_dir, events.name))
    return state


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measurements(each) for key, each in value.items() if not MEASURED.search(key)}
    return [without_measurements(each) for each in value] if isinstance(value, list) else value


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The paths in which two end states differ, with whether they are missing, extra or different."""
    words = {(True, False): "extra", (False, True): "missing", (True, True): "different"}
    names = sorted(found.keys() | expected.keys())
    return [f"{name}: {words[name in found, name in expected]}" for name in names if found.get(name) != expected.get(name)]
