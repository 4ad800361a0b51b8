"""One sbatch and a finished student: on several nodes, preempted, out of time, after lost nodes and cut cables."""

from __future__ import annotations

import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cluster import wait_for
from conftest import write_config
from jobs import LONG, STEPS, TIMEOUT, Job, assert_same_losses, changed_code, digests, losses, make_folder, newest
from reference_times import hang_limit, starts

from distill.run.heartbeats import SILENCE
from distill.shards import ShardReader
from distill.shards.verify import verify_all

pytestmark = [pytest.mark.slow, pytest.mark.serial]
ASLEEP_AFTER_A_SHARD = """
import os, time
_rows_present_now, _asked = _rows_present, []
def _rows_present(shards):  # asked in the main thread before a chunk is encoded, for both sets
    _asked.append(shards)
    if len(_asked) > 2 and "SLURM_RESTART_COUNT" not in os.environ:
        open(os.path.join(os.environ["ASLEEP"], os.environ["SLURM_ARRAY_TASK_ID"]), "w").close()
        time.sleep(600)
    return _rows_present_now(shards)
"""


@pytest.fixture(scope="module")
def uninterrupted(running_cluster, embedded_once, tmp_path_factory, tiny_encoder) -> Path:
    """The directory of a run of LONG that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(embedded_once / "runs", folder / "runs")
    shutil.copy(embedded_once / "text.txt", folder)
    running_cluster.restore()
    job = Job(running_cluster, write_config(folder, tiny_encoder), *LONG)
    job.finished()
    return job.run


@pytest.mark.soak
def test_two_nodes_train_the_student_that_one_node_trains(cluster, tmp_path, tiny_encoder):
    stages = "stages=[precompute,ckd,hpd,export,evaluate]"
    runs = []
    for name, options in (("two", ()), ("one", ("--nodes=1", "--cpus-per-task=4"))):
        config = write_config(make_folder(tmp_path / name), tiny_encoder)
        ranks = "engine.num_ranks=4" if name == "one" else "engine.num_ranks=2"
        job = Job(cluster, config, stages, ranks, "hpd.init=ckd", "hpd.log_every=1", options=options)
        job.finished()
        runs.append(job.run)
    two, one = runs
    assert digests(two, "shards/**/*.tar") == digests(one, "shards/**/*.tar")
    for stage in ("ckd", "hpd"):
        assert_same_losses(two, one, 1e-5, stage)
    assert (two / "evaluate/results.json").exists() and (two / "export/hpd/modules.json").exists()


def test_a_job_warned_of_its_time_limit_and_preempted_is_requeued_until_it_is_done(cluster, embedded_copy, uninterrupted):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG)
    job.until_step(20)
    job.warn()
    job.until_requeued(1)
    job.until_step(newest(run) + random.randint(20, 60))
    job.preempt()
    job.finished()
    assert digests(run, "ckd/student/*.safetensors") == digests(uninterrupted, "ckd/student/*.safetensors")
    assert losses(run) == losses(uninterrupted) and losses(run)[0] == list(range(1, STEPS + 1))
    assert not (run / "STOP").exists()


def test_after_a_node_failure_the_job_continues_on_the_remaining_nodes(cluster, embedded_copy, uninterrupted):
    config, run = embedded_copy
    job = Job(cluster, config, *LONG, options=("--nodes=1-2",))
    job.until_step(60)
    assert job.state["NumNodes"] == "2", job.state
    cluster.kill("n2")
    job.until_requeued(1)
    printed = job.finished()
    assert job.state["NumNodes"] == "1", job.state
    assert "lost rank" in printed or "DUE TO NODE FAILURE" in printed
    assert_same_losses(run, uninterrupted, 1e-4)


@pytest.mark.soak
def test_a_cut_network_delays_or_ends_all_ranks_and_the_job_finishes_once_it_is_repaired(cluster, embedded_copy, uninterrupted):
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
    job.until(lambda: re.search(r"error: after step \d+: .*(cut|lost)", job.printed), TIMEOUT + SILENCE + starts(2))
    words = re.compile(r"rank \d step \d+: (error: )?(ended )?after step \d+")
    wait_for(lambda: all(words.search(line) for line in last_lines(run)), starts(2), lambda: str(last_lines(run)))
    for line in last_lines(run):
        at = time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
        assert at - cut < TIMEOUT + SILENCE + starts(2), line
    job.until_requeued(1)
    cluster.cable("n2", in_place=True)
    job.finished()
    assert losses(run) == losses(uninterrupted)


def last_lines(run: Path) -> list[str]:
    """Of each rank's log of training."""
    logs = sorted(run.glob("logs/ckd-rank-*.log"))
    assert len(logs) == 4
    return [log.read_text().splitlines()[-1] for log in logs]


def test_each_task_of_an_array_comes_back_by_itself_and_killed_ones_are_made_up_for(
    cluster, tmp_path, embedded_once, tiny_encoder
):
    """In its first start, a task falls asleep over its second shard. Six are warned of their time limit, two are killed."""
    config, run, asleep = write_config(tmp_path, tiny_encoder), tmp_path / "runs/tiny", make_folder(tmp_path / "asleep")
    killed = random.Random(3).sample(range(8), 2)
    options = ("--array=0-7", f"--output={tmp_path}/%a.log")
    code = changed_code(tmp_path, {"teacher/encode_missing.py": ASLEEP_AFTER_A_SHARD}) | {"ASLEEP": str(asleep)}
    number = cluster.submit(*options, "slurm/precompute.sh", config, "shards.rows=25", **code)
    ended: set[str] = set()
    while len(ended) < 8:
        for task in wait_for(lambda: {path.name for path in asleep.iterdir()} - ended, hang_limit(), lambda: str(ended)):
            signal = ("--full", "--signal=KILL") if int(task) in killed else ("--batch", "--signal=USR1")
            cluster("scancel", *signal, f"{number}_{task}")
            ended.add(task)
    wait_for(lambda: not cluster("squeue", "--noheader", "--array", f"--jobs={number}", check=False).strip(), hang_limit())
    for task in range(8):
        printed, state = (tmp_path / f"{task}.log").read_text(), cluster.job(f"{number}_{task}")
        assert state["Restarts"] == ("0" if task in killed else "1"), f"{state}\n{printed}"
        assert printed.count(f"job {number}_{task}: requeued") == (0 if task in killed else 1), printed
        assert "without progress" not in printed
    assert (run / "precompute/DONE.json").exists() and verify_all(run / "shards") == []
    made, expected = (ShardReader(folder / "shards") for folder in (run, embedded_once / "runs/tiny"))
    rows = np.arange(len(expected))
    assert made.texts(rows) == expected.texts(rows)
    np.testing.assert_allclose(made.vectors(rows), expected.vectors(rows), atol=2e-3)  # in other batches, of smaller chunks


@pytest.mark.parametrize(
    "launcher", [*(pytest.param(name, marks=pytest.mark.soak) for name in ("deepspeed", "torchrun")), "srun"]
)
def test_ranks_of_a_job_may_be_started_by_any_launcher(cluster, embedded_copy, launcher):
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
    printed = cluster("srun", "--nodes=2", tasks, "bash", "-c", whole, OMP_NUM_THREADS="1")
    assert (run / "ckd/DONE.json").exists(), printed
    assert len(list(run.glob("logs/ckd-rank-*.log"))) == 4
