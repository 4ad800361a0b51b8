"""A training stage that runs in the background, however its ranks were started: what they are, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from commands import ROOT, command, deepspeed, environment
from distributed_ranks import free_port
from reference_times import hang_limit


class TrainingProcesses:
    """Processes that train one stage. `config` tells them from all others: each has its path among its arguments."""

    def __init__(self, commands: Sequence[list[str]], environments: Sequence[dict[str, str]], config: Path) -> None:
        self.config = config
        self._limit = hang_limit()  # measured before the processes run
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  it lives as long as this object
        self._processes = [
            subprocess.Popen(
                each, env=environment() | own, cwd=ROOT, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
            )
            for each, own in zip(commands, environments, strict=True)
        ]

    def __enter__(self) -> TrainingProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._output.close()

    @property
    def main(self) -> int:
        """The process that was started first: the launcher, where there is one."""
        return self._processes[0].pid

    @property
    def printed(self) -> str:
        self._output.flush()
        return os.pread(self._output.fileno(), 1_000_000, 0).decode()

    def processes(self) -> dict[int, list[str]]:
        """The arguments of every process of this stage, launchers too."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if str(self.config) in arguments:
                found[int(folder.name)] = arguments
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for pid, arguments in self.processes().items():
            if any(argument.endswith("train.py") for argument in arguments[1:3]):
                variables = dict(
                    line.split("=", 1)
                    for line in Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
                    if "=" in line
                )
                found[int(variables["RANK"])] = pid
        return found

    def wait_for(self, path: Path, pattern: str) -> None:
        """Returns once a file under `path` matches `pattern`."""
        deadline = time.monotonic() + self._limit
        while not any(path.glob(pattern)):
            assert time.monotonic() < deadline and all(process.poll() is None for process in self._processes), self.printed
            time.sleep(0.01)

    def wait(self, limit: float | None = None) -> list[int]:
        """The exit codes of what was started, which must end within `limit` seconds, if given, and leave nothing behind."""
        limit = self._limit if limit is None else limit
        deadline = time.monotonic() + limit
        while any(process.poll() is None for process in self._processes) or self.processes():
            assert time.monotonic() < deadline, f"still running after {limit:.0f} s: {self.processes()}\n{self.printed}"
            time.sleep(0.05)
        return [process.returncode for process in self._processes]


def start_training(launcher: str, num_ranks: int, config: Path, *overrides: str) -> TrainingProcesses:
    """`launcher`: deepspeed, torchrun, pipeline, or none: each rank started by hand."""
    arguments = ["--config", config, *overrides]
    if launcher == "deepspeed":
        started = deepspeed(num_ranks, *arguments)
    elif launcher == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        started = [*program, "--master-port", str(free_port()), *command("train.py", *arguments)[1:]]
    elif launcher == "pipeline":
        started = command("pipeline.py", *arguments, "stages=[ckd]", f"engine.num_ranks={num_ranks}")
    else:
        place = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [place | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(num_ranks)]
        return TrainingProcesses([command("train.py", *arguments)] * num_ranks, places, config)
    return TrainingProcesses([started], [{}], config)
