"""slurm/distill.sh on the tests' cluster, and what it leaves behind."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import ENDED, ROOT, Cluster, wait_for
from reference_times import hang_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TIMEOUT = 15  # engine.timeout
STEPS = 400  # more than a fast machine trains until it is preempted or a node is lost
LONG = ["stages=[ckd]", f"ckd.max_steps={STEPS}", "ckd.epochs=1000", "ckd.save_every=20", "ckd.dev_every=200",
        f"engine.timeout={TIMEOUT}"]  # fmt: skip


class Job:
    """slurm/distill.sh on two nodes with two ranks each, submitted once."""

    def __init__(
        self, cluster: Cluster, config: Path, *overrides: str, options: tuple[str, ...] = (), **environment: str
    ) -> None:
        self.cluster = cluster
        self.log = config.with_name("job.log")
        self.run = config.parent / "runs/tiny"
        asked = ("--nodes=2", f"--output={self.log}", *options)
        self.number = cluster.submit(*asked, "slurm/distill.sh", config, *overrides, **environment)

    @property
    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def until(self, condition: Callable[[], object], limit: float | None = None) -> None:
        """Returns once `condition()` is true; fails where the job ends before it is, or after `limit` seconds, if given."""

        def holds_or_ended() -> object:
            has_ended = self.state["JobState"] in ENDED
            return condition() or has_ended

        wait_for(holds_or_ended, hang_limit() if limit is None else limit, lambda: f"{self.state}\n{self.printed}")
        assert condition(), f"{self.state}\n{self.printed}"

    def until_step(self, step: int) -> None:
        self.until(lambda: newest(self.run) >= step)

    def until_requeued(self, times: int) -> None:
        self.until(lambda: int(self.state["Restarts"]) >= times)

    def until_printed(self, words: str, times: int = 1) -> None:
        self.until(lambda: self.printed.count(words) >= times)

    def warn(self) -> None:
        """The signal that Slurm sends to the batch script before its time limit."""
        self.cluster("scancel", "--batch", "--signal=USR1", self.number)

    def preempt(self) -> None:
        """A job in a higher partition takes all nodes, for a moment."""
        before = int(self.state["Restarts"])
        asked = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        urgent = self.cluster.submit(*asked)
        self.until_requeued(before + 1)
        self.cluster.wait(urgent)

    def finished(self) -> str:
        """What it has printed once it has ended well."""
        ended = self.cluster.wait(self.number)
        assert ended["JobState"] == "COMPLETED", f"{ended}\n{self.printed}"
        return self.printed


def newest(run: Path) -> int:
    """The step of the newest checkpoint; -1 before the first."""
    return max((int(path.parent.name[5:]) for path in run.glob("ckd/checkpoints/step-????????/COMPLETE.json")), default=-1)


def losses(run: Path, stage: str = "ckd") -> tuple[list[int], list[float]]:
    """Every step and its loss, as TensorBoard's own reader finds them, in the order of writing."""
    events = EventAccumulator(str(run / "tensorboard" / stage), size_guidance={"scalars": 0}).Reload().Scalars("loss")
    return [event.step for event in events], [event.value for event in events]


def assert_same_losses(run: Path, other: Path, relative: float, stage: str = "ckd") -> None:
    (steps, values), (other_steps, other_values) = losses(run, stage), losses(other, stage)
    assert steps == other_steps
    assert values == pytest.approx(other_values, rel=relative)


def digests(folder: Path, pattern: str) -> dict[str, str]:
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))}
    assert found
    return found


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def changed_code(folder: Path, more: dict[str, str]) -> dict[str, str]:
    """The environment in which `distill` is a copy of ours, with more at the end of some of its files."""
    shutil.copytree(ROOT / "distill", folder / "changed/distill", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", folder / "changed/configs")
    for name, text in more.items():
        with (folder / "changed/distill" / name).open("a") as file:
            file.write(text)
    # before a launcher puts its own clone first in sys.path
    (folder / "changed/sitecustomize.py").write_text("import distill\n")
    return {"PYTHONPATH": str(folder / "changed")}
