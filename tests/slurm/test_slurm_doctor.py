"""The doctor on two Slurm nodes: healthy ones pass, and a fault injected on one of them is reported with that node's name.

Each node's process is started by a bash script in its own mount namespace; the script injects the fault, then runs "$@".
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from distributed_ranks import free_port
from reference_times import starts

pytestmark = [pytest.mark.slow, pytest.mark.serial]
PROMISED = 20  # seconds that doctor.py may take once its processes have started, where nothing hangs
FINDING = re.compile(r"^(FAULT|warning)  (\w+)  (.+?): (.*)$", re.MULTILINE)
TIMEOUT = 200.0  # seconds; the checks that all ranks reach end long before, unless this machine is very busy


@dataclass(frozen=True)
class Answer:
    code: int
    printed: str
    seconds: float

    @property
    def findings(self) -> set[tuple[str, str, str]]:
        """(FAULT or warning, check, node) of each."""
        return {found[:3] for found in FINDING.findall(self.printed)}


@pytest.fixture
def config(tmp_path: Path, tiny_encoder: Path) -> Path:
    shutil.copytree(tiny_encoder, tmp_path / "models/teacher")
    (tmp_path / "text.txt").write_text("a teacher that sends a vector to the student\n" * 100)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
name: tiny
stages: [precompute, ckd]
runs_dir: {tmp_path}/runs
text: {{sources: [{{type: file, path: {tmp_path}/text.txt}}]}}
teacher: {{model: {tmp_path}/models/teacher, pooling: mean}}
"""
    )
    return config


Ask = Callable[..., Answer]


@pytest.fixture
def ask(cluster: Cluster, config: Path, tmp_path: Path) -> Ask:
    """ask(n1=..., n2=..., tasks=..., timeout=..., **environment): the doctor's answer, with faults planted on nodes."""

    def ask(n1: str = "", n2: str = "", tasks: int = 1, timeout: float = TIMEOUT, **environment: str) -> Answer:
        wrapper = tmp_path / "wrapper.sh"
        for node, plant in (("n1", n1), ("n2", n2)):
            (tmp_path / f"{node}.sh").write_text(f'{plant}\nexec "$@"\n')
        wrapper.write_text(f'exec unshare --mount bash {tmp_path}/$(hostname).sh "$@"\n')
        doctor = [sys.executable, ROOT / "launcher/doctor.py", "--config", config, "--timeout", str(timeout)]
        srun = ["srun", "--nodes=2", f"--ntasks-per-node={tasks}", "bash", wrapper, *doctor]
        started = time.monotonic()
        exports = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
        printed = cluster("bash", "-c", '"$@"; echo exit code $?', "srun", *srun, check=False, timeout=2 * TIMEOUT, **exports)
        seconds = time.monotonic() - started
        code = re.search(r"^exit code (\d+)$", printed, re.MULTILINE)
        assert code is not None, printed
        assert not list(tmp_path.glob("runs/tiny/.doctor*")), printed
        return Answer(int(code[1]), printed, seconds)

    return ask


@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_two_healthy_nodes(ask, tasks):
    answer = ask(tasks=tasks)
    assert answer.code == 0 and answer.findings == set(), answer.printed
    expected = rf"doctor: 2 nodes, {2 * tasks} processes: all is well \(all-reduce [\d.]+ [GM]B/s\)"
    assert re.match(f"{expected}\nexit code 0\n$", answer.printed), answer.printed
    assert answer.seconds < PROMISED + starts(2 * tasks)


def test_many_faults_of_one_node_are_all_reported(ask, tmp_path):
    packages = tmp_path / "packages/numpy-1.26.4.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    (tmp_path / "other.txt").write_text("another sentence than that of the first node\n")
    plant = f"""
        export PYTHONPATH={tmp_path}/packages:$PYTHONPATH GLOO_SOCKET_IFNAME=ib7
        mount --bind {tmp_path}/other.txt {tmp_path}/text.txt
        mount -t tmpfs hidden {tmp_path}/models
        mount -t tmpfs -o size=4m shm /dev/shm && head -c 8M /dev/zero >/dev/shm/full 2>/dev/null
        ulimit -n 512
    """
    expected = {
        ("FAULT", "software", "n2"),
        ("FAULT", "inputs", "n2"),
        ("FAULT", "shm", "n2"),
        ("FAULT", "names", "n2"),
        ("FAULT", "network", "n2"),
        ("warning", "limits", "n2"),
    }
    if clock := late_clock(tmp_path):
        plant += f"export LD_PRELOAD={clock}\n"
        expected.add(("warning", "clocks", "n2"))
    answer = ask(n2=plant)
    assert answer.code == 1, answer.printed
    for words in (
        "n2: numpy is 1.26.4 here, 2.4",
        "n2: teacher.model: no model at",
        "text.txt is not the same as on n1",
        "n2: /dev/shm is full",
        "n2: GLOO_SOCKET_IFNAME names ib7",
        "n2: a process may open 512 files",
    ):
        assert words in answer.printed, (words, answer.printed)
    found = {(level, check, "n2" if check == "network" else node) for level, check, node in answer.findings}
    assert found == expected, answer.printed
    assert answer.seconds < PROMISED + starts(4)


def late_clock(folder: Path) -> Path | None:
    """A library that sets the clock of its process back by an hour; None where nothing can compile it."""
    if (compiler := shutil.which("cc")) is None:
        return None
    source, library = folder / "late.c", folder / "late.so"
    source.write_text(
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <time.h>
        int clock_gettime(clockid_t id, struct timespec *now) {
            int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
            int failed = real(id, now);
            if (id == CLOCK_REALTIME) now->tv_sec -= 3600;
            return failed;
        }
        """
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.soak
def test_changed_code_and_host_names_that_resolve_to_loopback(ask, tmp_path):
    module = ROOT / "distill/run/sampling.py"
    (tmp_path / "changed.py").write_text(f"{module.read_text()}\nCHANGED = True\n")
    hosts = f"{tmp_path}/{{node}}.hosts"
    loopback = f"sed 's/.* {{node}}$/127.0.1.1 {{node}}/' /etc/hosts >{hosts}; mount --bind {hosts} /etc/hosts"
    answer = ask(
        n1=loopback.format(node="n1"),
        n2=f"""
        {loopback.format(node="n2")}
        mount --bind {tmp_path}/changed.py {module}
        """,
    )
    assert answer.code == 1, answer.printed
    assert "n2: the code differs from that of n1: distill/run/sampling.py" in answer.printed, answer.printed
    for node in ("n1", "n2"):
        assert f"{node}: its own name {node} is 127.0.1.1 here" in answer.printed, answer.printed
    assert "all ranks came, but the all-reduce failed" in answer.printed, answer.printed
    assert {found for found in answer.findings if found[1] != "network"} == {
        ("FAULT", "software", "n2"),
        ("FAULT", "names", "n1"),
        ("FAULT", "names", "n2"),
    }, answer.printed


def test_a_run_directory_that_one_node_cannot_write(ask, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    runs = tmp_path / "runs"
    answer = ask(n2=f"mount --bind {runs} {runs} && mount -o remount,bind,ro {runs}")
    assert answer.code == 1 and answer.findings == {("FAULT", "storage", "n2")}, answer.printed
    assert re.search(r"^FAULT  storage  n2: .*Read-only file system", answer.printed, re.MULTILINE), answer.printed


@pytest.mark.soak
def test_another_file_system_in_place_of_the_run_directory(ask, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    answer = ask(n2=f"mount -t tmpfs elsewhere {tmp_path}/runs")
    assert answer.code == 1 and answer.findings == {("FAULT", "storage", "n2")}, answer.printed
    assert "runs/tiny is not the run directory of n1" in answer.printed, answer.printed
    assert "tmpfs elsewhere on n2" in answer.printed, answer.printed


@pytest.mark.soak
def test_a_node_whose_process_never_starts(ask):
    answer = ask(n2="exit 0", timeout=round(14 + starts(2)))
    assert answer.code == 1 and answer.findings == {("FAULT", "rendezvous", "n2")}, answer.printed
    assert re.search(r"n2: rank 1 did not come to n1:\d+ within \d+ s", answer.printed), answer.printed
    assert answer.seconds < PROMISED + starts(2)


@pytest.mark.soak
def test_a_port_that_is_taken_and_a_name_that_is_not_known(ask, tmp_path):
    port = free_port()
    listen = f"""
import os, socket, time
parent, server = os.getppid(), socket.create_server(('', {port}))
while os.getppid() == parent:
    time.sleep(0.1)
"""
    answer = ask(
        n1=f'{sys.executable} -c "{listen}" & sleep 0.5',
        n2=f"grep -v n1 /etc/hosts >{tmp_path}/hosts; mount --bind {tmp_path}/hosts /etc/hosts",
        MASTER_ADDR="n1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1000",
        timeout=round(34 + starts(2)),
    )
    assert answer.code == 1, answer.printed
    assert f"n1: port {port} is in use on n1" in answer.printed, answer.printed
    assert "n2: MASTER_ADDR n1 cannot be resolved here" in answer.printed, answer.printed
    assert f"n2: rank 1 did not reach rank 0 at n1:{port}" in answer.printed, answer.printed
    assert answer.findings == {
        ("FAULT", "rendezvous", "n1"),
        ("FAULT", "rendezvous", "n2"),
        ("FAULT", "names", "n2"),
        ("warning", "devices", "n1"),
        ("warning", "devices", "n2"),
    }, answer.printed


def test_a_cut_cable_and_a_disk_that_hangs(ask, tmp_path):
    """The hanging disk is a fifo that nobody writes to. Rank 0 reports the lost node, which itself reports its disk."""
    answer = ask(
        n2=f"""
        cp -r {tmp_path}/models {tmp_path}/hanging && mkfifo {tmp_path}/hanging/teacher/more.safetensors
        mount --bind {tmp_path}/hanging {tmp_path}/models
        exec unshare --net "$@"
        """,
        MASTER_ADDR="n1",
        MASTER_PORT=str(free_port()),
        timeout=round(18 + starts(2)),
    )
    assert answer.code == 1, answer.printed
    assert "n2: rank 1 did not come to n1:" in answer.printed, answer.printed
    assert "n2: rank 1 did not reach rank 0 at n1:" in answer.printed, answer.printed
    assert {("FAULT", "rendezvous", "n2"), ("FAULT", "storage", "n2")} <= answer.findings, answer.printed
    assert re.search(r"the check failed: not done after \d+ s", answer.printed), answer.printed
    assert answer.seconds < PROMISED + starts(4)
