"""A real Slurm of several nodes on this machine, each with a network, a name and a /dev/shm of its own (slurm/up.sh, down.sh).

A test submits jobs to it and breaks it: kills a node, cuts a cable. `restore` repairs it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from reference_times import hang_limit

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests/slurm"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


class Cluster:
    """Started by `restore`, ended by `down`; its state is in `folder`."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._knobs = {
            "SLURM_TEST_DIR": str(folder),
            "SLURM_TEST_NODES": str(nodes),
            "SLURM_TEST_CPUS": str(cpus),
            "SLURM_TEST_NETNS": "1",
            "SLURM_TEST_WAIT": str(round(hang_limit())),
        }
        self._exports: dict[str, str] = {}

    def restore(self) -> None:
        """Every node up, every cable in; starts what does not run."""
        for node in self.nodes if self._exports else ():
            self.cable(node, in_place=True)
        up = subprocess.run(
            ["bash", str(SCRIPTS / "up.sh")], env=os.environ | self._knobs, capture_output=True, text=True, timeout=hang_limit()
        )
        assert up.returncode == 0, up.stderr
        self._exports = dict(
            line.removeprefix("export ").removesuffix(";").replace("'", "").split("=", 1)
            for line in up.stdout.splitlines()
            if line.startswith("export ")
        )

    def down(self) -> None:
        """Ends it. Nothing may be left of what ran on it: no file in a node's /dev/shm, no process, no network."""
        in_shm = [str(path) for node in self.nodes for path in Path(f"/proc/{self._daemon(node)}/root/dev/shm").iterdir()]
        networks = [Path("/run/netns", name) for name in (self.folder / "netns").read_text().split()]
        command = ["bash", str(SCRIPTS / "down.sh"), "--purge"]
        down = subprocess.run(command, env=os.environ | self._knobs, capture_output=True, text=True, timeout=hang_limit())
        assert down.returncode == 0 and "left over" not in down.stderr, down.stderr
        wait_for(lambda: not self._processes(), hang_limit(), lambda: f"ended: {self._processes()}")
        assert not [path for path in networks if path.exists()]
        assert not in_shm

    def _daemon(self, node: str) -> str:
        """The process number of a node's slurmd."""
        names = {line.split()[0]: line.split()[1] for line in (self.folder / "pids").read_text().splitlines()}
        return names[f"slurmd-{node}"]

    def _processes(self) -> list[str]:
        """The command lines of all processes that have this cluster in their environment: daemons, jobs and their ranks."""
        mark = f"SLURM_TEST_DIR={self.folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def __call__(self, *command: object, check: bool = True, timeout: float | None = None, **environment: str) -> str:
        """Runs a client command beside the controller; returns what it prints."""
        inside = [*shlex.split(self._exports["SLURM_TEST_EXEC"]), *map(str, command)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        done = subprocess.run(
            inside, env=kept | self._exports | environment, cwd=ROOT, text=True, timeout=timeout or hang_limit(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}:\n{done.stdout}"
        return done.stdout

    def submit(self, *arguments: object, **environment: str) -> int:
        return int(self("sbatch", "--parsable", *arguments, **environment).strip())

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, Restarts, ExitCode, NodeList ..."""
        shown = self("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: int, limit: float | None = None) -> dict[str, str]:
        """The job once it has ended for good, within `limit` seconds, if given."""
        limit = hang_limit() if limit is None else limit
        return wait_for(lambda: (job := self.job(number))["JobState"] in ENDED and job, limit, lambda: str(self.job(number)))

    def cable(self, node: str, *, in_place: bool) -> None:
        """Plugs a node's cable in, or pulls it out."""
        state = "up" if in_place else "down"
        self("ip", "link", "set", node, state)

    def kill(self, node: str) -> None:
        """A node dies: its slurmd and every process on it, at once."""
        uts = _uts(Path("/proc") / self._daemon(node))
        on_node = [path.name for path in Path("/proc").glob("[0-9]*") if _uts(path) == uts]
        subprocess.run(["kill", "-9", *on_node], check=False)


def _uts(process: Path) -> str:
    try:
        return str((process / "ns/uts").readlink())
    except OSError:
        return ""


def wait_for(condition: Callable[[], T], limit: float, describe: Callable[[], str] = lambda: "") -> T:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit:.0f} s {describe()}"
        time.sleep(0.2)
    return value
