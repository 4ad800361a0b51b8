"""One sbatch and a finished student: on several nodes, preempted, out of time, after lost nodes, cut cables and failures."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from conftest import write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow
TIMEOUT = 8  # engine.timeout
LONG = ["stages=[ckd]", "ckd.max_steps=1500", "ckd.epochs=1000", "ckd.save_every=20", "ckd.dev_every=250",
        f"engine.timeout={TIMEOUT}"]  # fmt: skip


class Job:
    """slurm/distill.sh on two nodes with two ranks each, submitted once."""

    def __init__(self, cluster: Cluster, config: Path, *overrides: str, options: tuple[str, ...] = ()) -> None:
        self.cluster = cluster
        self.log = config.with_name("job.log")
        self.run = config.parent / "runs/tiny"
        asked = ("--nodes=2", f"--output={self.log}", *options)
        self.number = cluster.submit(*asked, "slurm/distill.sh", config, *overrides)

    @property
    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def until(self, condition: Callable[[], object], timeout: float = 200) -> None:
        wait_for(condition, timeout, lambda: f"{self.state}\n{self.printed}")

    def until_step(self, step: int) -> None:
        self.until(lambda: newest(self.run) >= step)

    def until_it_came_back(self, times: int) -> None:
        self.until(lambda: int(self.state["Restarts"]) >= times)

    def finished(self, timeout: float = 300) -> str:
        """What it has printed once it has ended well."""
        ended = self.cluster.wait(self.number, timeout)
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


@pytest.fixture(scope="module")
def uninterrupted(running_cluster, embedded_once, tmp_path_factory, tiny_encoder) -> Path:
    """The directory of a run of LONG that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(embedded_once / "runs", folder / "runs")
    shutil.copy(embedded_once / "text.txt", folder)
    running_cluster.heal()
    job = Job(running_cluster, write_config(folder, tiny_encoder), *LONG)
    job.finished()
    return job.run


def test_two_nodes_make_the_student_that_one_makes(cluster, tmp_path, tiny_encoder):
    stages = "stages=[precompute,ckd,finetune,hpd,export,evaluate]"
    runs = []
    for name, options in (("two", ()), ("one", ("--nodes=1", "--cpus-per-task=4"))):
        config = write_config(make_folder(tmp_path / name), tiny_encoder)
        ranks = "engine.num_ranks=4" if name == "one" else "engine.num_ranks=2"
        logs = ("finetune.dropout=0", "finetune.log_every=1", "hpd.log_every=1")
        job = Job(cluster, config, stages, ranks, *logs, options=options)
        job.finished()
        runs.append(job.run)
    two, one = runs
    assert digests(two, "shards/**/*.tar") == digests(one, "shards/**/*.tar")
    for stage in ("ckd", "finetune", "hpd"):
        assert_same_losses(two, one, 1e-5, stage)
    assert (two / "evaluate/results.json").exists() and (two / "export/hpd/modules.json").exists()


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_preempted_and_out_of_time_it_comes_back_until_it_is_done(cluster, embedded_copy, uninterrupted):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG, options=("--time=2", "--signal=B:USR1@60"))
    job.until_it_came_back(1)  # warned of its time limit
    cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    for _ in range(2):
        before = int(job.state["Restarts"])
        job.until_step(max(newest(run), 0) + random.randint(20, 120))
        urgent = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
        job.until_it_came_back(before + 1)
        cluster.wait(urgent)
    job.finished()
    assert digests(run, "ckd/student/*.safetensors") == digests(uninterrupted, "ckd/student/*.safetensors")
    assert losses(run) == losses(uninterrupted) and losses(run)[0] == list(range(1, 1501))
    assert not (run / "STOP").exists()


def test_after_a_node_has_died_it_goes_on_with_those_that_are_left(cluster, embedded_copy, uninterrupted):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG, options=("--nodes=1-2",))
    job.until_step(60)
    assert job.state["NumNodes"] == "2", job.state
    cluster.kill("n2")
    job.until_it_came_back(1)
    printed = job.finished()
    assert job.state["NumNodes"] == "1", job.state
    assert "lost rank" in printed or "DUE TO NODE FAILURE" in printed
    assert_same_losses(run, uninterrupted, 1e-4)


def cut_off_in_training(cluster: Cluster, config: Path) -> Job:
    job = Job(cluster, config, *LONG)
    job.until_step(60)
    cluster.cable("n2", in_place=False)
    return job


def test_a_cable_that_is_cut_ends_all_ranks_and_the_job_comes_back_when_it_is_mended(
    full, cluster, embedded_copy, uninterrupted
):
    if not full:
        pytest.skip("takes minutes: with --full")
    config, run = embedded_copy
    job = cut_off_in_training(cluster, config)
    cut = time.monotonic()
    job.until(lambda: re.search(r"error: after step \d+: .*(cut|lost)", job.printed), TIMEOUT + 10)
    assert time.monotonic() - cut < TIMEOUT + 10
    job.until_it_came_back(1)
    cluster.cable("n2", in_place=True)
    job.finished()
    assert_same_losses(run, uninterrupted, 1e-4)


def test_a_cable_that_is_out_for_less_than_the_timeout_only_delays(full, cluster, embedded_copy, uninterrupted):
    if not full:
        pytest.skip("takes minutes: with --full")
    config, run = embedded_copy
    job = cut_off_in_training(cluster, config)
    time.sleep(TIMEOUT / 2)
    cluster.cable("n2", in_place=True)
    job.finished()
    assert job.state["Restarts"] == "0"
    assert losses(run) == losses(uninterrupted)


def test_an_array_of_tasks_of_which_a_third_is_killed_embeds_all_the_text(cluster, tmp_path, embedded_once, tiny_encoder):
    config, run = write_config(tmp_path, tiny_encoder), tmp_path / "runs/tiny"
    number = cluster.submit("--array=0-7", f"--output={tmp_path}/%a.log", "slurm/precompute.sh", config)
    wait_for(lambda: any(run.glob("shards/**/.*.claim")) or any(run.glob("shards/**/*.tar")), 60)
    for task in random.Random(3).sample(range(8), 3):
        cluster("scancel", "--signal=KILL", "--full", f"{number}_{task}", check=False)
    wait_for(lambda: not cluster("squeue", "--noheader", "--array", f"--jobs={number}", check=False).strip(), 120)
    assert digests(run / "shards", "**/*.tar") == digests(embedded_once / "runs/tiny/shards", "**/*.tar")
    assert (run / "precompute/DONE.json").exists()


def test_what_is_wrong_in_the_config_is_said_once_and_ends_the_job(cluster, embedded_copy):
    config, _ = embedded_copy
    started = time.monotonic()
    job = Job(cluster, config, "ckd.learning_rate=1")
    ended = cluster.wait(job.number, 60)
    assert time.monotonic() - started < 60
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), ended
    assert job.printed.count("error:") == 1 and "ckd.learning_rate" in job.printed, job.printed


def test_what_fails_again_and_again_is_not_started_for_ever(cluster, embedded_copy):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG, "ckd.save_every=100000", "ckd.max_steps=100000")
    killed = set()
    for _ in range(3):
        job.until(lambda: set(run.glob(".ckd.ranks/*/3.json")) - killed)
        (rank,) = set(run.glob(".ckd.ranks/*/3.json")) - killed
        killed.add(rank)
        os.kill(json.loads(rank.read_text())["pid"], signal.SIGKILL)
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), f"{ended}\n{job.printed}"
    assert len(re.findall("task 3: Killed", job.printed)) == 3 and "failed 3 times without getting further" in job.printed


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_one_launcher_a_node_serves_as_well(cluster, embedded_copy, launcher):
    config, run = embedded_copy
    script, programs = f"launcher/train.py --config {config} stage=ckd", Path(sys.executable).parent
    place = "--master_addr $(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) --master_port 29400"
    hosts = config.with_name("hosts")
    hosts.write_text("n1 slots=2\nn2 slots=2\n")
    options = {
        "deepspeed": f"--hostfile {hosts} --no_ssh --node_rank $SLURM_NODEID",
        "torchrun": "--nnodes 2 --nproc-per-node 2 --node-rank $SLURM_NODEID",
    }[launcher]
    start = f"{programs / launcher} {options} {place} {script}"
    printed = cluster("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", start, timeout=180, OMP_NUM_THREADS="1")
    assert (run / "ckd/DONE.json").exists(), printed
