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
from cluster import ROOT, Cluster, wait_for
from commands import launch
from conftest import write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow
TIMEOUT = 15  # engine.timeout
STEPS = 600
LONG = ["stages=[ckd]", f"ckd.max_steps={STEPS}", "ckd.epochs=1000", "ckd.save_every=20", "ckd.dev_every=200",
        f"engine.timeout={TIMEOUT}"]  # fmt: skip
ASLEEP = """
import os, sys, time
def fall_asleep(*_):
    open(os.path.join(os.environ["ASLEEP"], os.environ.get("SLURM_RESTART_COUNT", "0")), "w").close()
    time.sleep(600)
"""
DEAF_AT_FIRST = """
if sys.argv[0].endswith("precompute.py") and "--text-only" not in sys.argv and "SLURM_RESTART_COUNT" not in os.environ:
    fall_asleep()
"""
SLOW = "run_precompute = fall_asleep"
RANK_3_FAILS = """
import os
_step = Trainer._step
def _fails(self, step, micro):
    if rank() == 3 and step == 30 and os.environ.get("SLURM_RESTART_COUNT") == "2":
        raise RuntimeError("planted")
    return _step(self, step, micro)
Trainer._step = _fails
"""


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

    def until(self, condition: Callable[[], object], timeout: float = 200) -> None:
        wait_for(condition, timeout, lambda: f"{self.state}\n{self.printed}")

    def until_step(self, step: int) -> None:
        self.until(lambda: newest(self.run) >= step)

    def until_it_came_back(self, times: int) -> None:
        self.until(lambda: int(self.state["Restarts"]) >= times)

    def until_printed(self, words: str, times: int = 1) -> None:
        self.until(lambda: self.printed.count(words) >= times)

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


def preempt(job: Job) -> None:
    """A job in a higher partition takes all nodes, for a moment."""
    before = int(job.state["Restarts"])
    urgent = job.cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job.until_it_came_back(before + 1)
    job.cluster.wait(urgent)


def test_preempted_and_out_of_time_it_comes_back_until_it_is_done(cluster, embedded_copy, uninterrupted):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG, options=("--time=1", "--signal=B:USR1@55"))
    job.until_it_came_back(1)  # warned of its time limit
    cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    for _ in range(2):
        job.until_step(max(newest(run), 0) + random.randint(20, 120))
        preempt(job)
    job.finished()
    assert digests(run, "ckd/student/*.safetensors") == digests(uninterrupted, "ckd/student/*.safetensors")
    assert losses(run) == losses(uninterrupted) and losses(run)[0] == list(range(1, STEPS + 1))
    assert not (run / "STOP").exists()


def changed_code(folder: Path, more: dict[str, str]) -> dict[str, str]:
    """The environment in which `distill` is a copy of ours, with more at the end of some of its files."""
    shutil.copytree(ROOT / "distill", folder / "changed/distill", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in more.items():
        with (folder / "changed/distill" / name).open("a") as file:
            file.write(text)
    return {"PYTHONPATH": str(folder / "changed")}


def test_a_start_that_takes_longer_than_its_time_is_not_repeated_for_ever_but_preemptions_are(cluster, tmp_path, tiny_encoder):
    """The tasks of the precompute stage get nowhere. They hear a stop, except at the first start, where it kills them."""
    code = changed_code(tmp_path, {"__init__.py": ASLEEP + DEAF_AT_FIRST, "teacher/precompute.py": ASLEEP + SLOW})
    config, asleep = write_config(tmp_path, tiny_encoder), make_folder(tmp_path / "asleep")
    assert launch("precompute.py", "--config", config, "--text-only").returncode == 0  # or the first start would get further
    job = Job(cluster, config, "stages=[precompute]", **code, ASLEEP=str(asleep))
    for number, how in enumerate(("warned", "preempted", "warned", "warned")):
        job.until((asleep / str(number)).exists)
        if how == "preempted":
            preempt(job)
        else:
            cluster("scancel", "--batch", "--signal=USR1", job.number)
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "3"), f"{ended}\n{job.printed}"
    assert "3 starts got no further" in job.printed and "more --time" in job.printed, job.printed
    assert "failed" not in job.printed and "exit code" not in job.printed.replace("exit code 75", ""), job.printed


def test_what_is_cancelled_stays_cancelled(cluster, embedded_copy):
    job = Job(cluster, embedded_copy[0], *LONG)
    job.until_step(20)
    cluster("scancel", job.number)
    job.until_printed(f"job {job.number}: cancelled; not started again")
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), ended


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


def test_a_cut_cable_delays_or_ends_all_ranks_and_once_it_is_mended_the_job_finishes(cluster, embedded_copy, uninterrupted):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG)
    job.until_step(40)
    cluster.cable("n2", in_place=False)
    time.sleep(TIMEOUT / 3)
    cluster.cable("n2", in_place=True)
    job.until_step(newest(run) + 40)
    assert job.state["Restarts"] == "0" and "error:" not in job.printed, job.printed
    cluster.cable("n2", in_place=False)
    cut = time.time()
    job.until(lambda: re.search(r"error: after step \d+: .*(cut|lost)", job.printed), TIMEOUT + 10)
    words = re.compile(r"rank \d step \d+: (error: )?(ended )?after step \d+")
    wait_for(lambda: all(words.search(line) for line in last_lines(run)), 10, lambda: str(last_lines(run)))
    for line in last_lines(run):
        at = time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
        assert at - cut < TIMEOUT + 10, line
    job.until_it_came_back(1)
    cluster.cable("n2", in_place=True)
    job.finished()
    assert losses(run) == losses(uninterrupted)


def last_lines(run: Path) -> list[str]:
    """Of each rank's log of training."""
    logs = sorted(run.glob("logs/ckd-rank-*.log"))
    assert len(logs) == 4
    return [log.read_text().splitlines()[-1] for log in logs]


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


def test_what_fails_again_and_again_is_not_started_for_ever_and_each_time_it_is_said_why(cluster, embedded_copy, tmp_path):
    """Rank 3 is killed before the first checkpoint, then again, and then raises what nobody expects."""
    config, run = embedded_copy
    code = changed_code(tmp_path, {"training/loop.py": RANK_3_FAILS})
    job = Job(cluster, config, *LONG, "ckd.save_every=100000", "ckd.max_steps=100000", **code)
    killed = {-1}
    for _ in range(2):
        job.until(lambda: record_of_rank_3(run)["step"] > 0 and record_of_rank_3(run)["pid"] not in killed)
        pid = record_of_rank_3(run)["pid"]
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
        job.until_printed(f"lost rank 3 (pid {pid} on n2)")
    ended = cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), f"{ended}\n{job.printed}"
    assert "3 starts got no further" in job.printed, job.printed
    last = job.printed[job.printed.rindex("doctor:") :]
    assert last.count("Traceback") == 1, job.printed
    after = last[last.rindex("\nrank 3: error: RuntimeError: planted\n") :].splitlines()[2:]
    assert all(re.match(r"srun: |slurmstepd-n\d: |ckd ended with exit code 1;|job \d+: ", line) for line in after), job.printed


def record_of_rank_3(run: Path) -> dict[str, int]:
    """What it has last said of itself in this start, or in the one before."""
    try:
        newest = max(run.glob(".ckd.ranks/*/3.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(newest.read_text())
    except (OSError, ValueError):
        return {"pid": -1, "step": 0}


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_any_launcher_serves_as_well(cluster, embedded_copy, launcher):
    """One deepspeed or torchrun a node, or a task a rank."""
    config, run = embedded_copy
    script, programs = f"launcher/train.py --config {config} stage=ckd", Path(sys.executable).parent
    place = "--master_addr $(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) --master_port 29400"
    hosts = config.with_name("hosts")
    hosts.write_text("n1 slots=2\nn2 slots=2\n")
    start = {
        "deepspeed": f"deepspeed --hostfile {hosts} --no_ssh --node_rank $SLURM_NODEID {place}",
        "torchrun": f"torchrun --nnodes 2 --nproc-per-node 2 --node-rank $SLURM_NODEID {place}",
        "srun": "python",
    }[launcher]
    tasks = f"--ntasks-per-node={2 if launcher == 'srun' else 1}"
    whole = f"{programs}/{start} {script}"
    printed = cluster("srun", "--nodes=2", tasks, "bash", "-c", whole, timeout=180, OMP_NUM_THREADS="1")
    assert (run / "ckd/DONE.json").exists(), printed
    assert len(list(run.glob("logs/ckd-rank-*.log"))) == 4
