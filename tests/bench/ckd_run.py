"""Shared by the training benchmarks: a CKD run embedded once, a process per rank, and the time of a step's parts."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, here and in every rank
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from precompute import keep_freed_memory_in_children, read_texts

from distill.config import RunConfig, stage_of
from distill.run.config import dump_config
from distill.run.precision import autocast_dtype
from distill.training import loop, training_stage
from distill.training.tasks.ckd import CkdStage
from distill.training.teacher_keys import TeacherKeysTask

CPU = torch.device("cpu")
PIPELINE = Path(__file__).parents[2] / "launcher" / "pipeline.py"
NEVER = 10**9


def run_parser(description: str | None, *, num_texts: int, global_batch: int, micro_batch: int) -> argparse.ArgumentParser:
    """Options of `embedded_run`, with these defaults, and of the result's file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a sentence-transformers folder: the teacher, whose layers the student takes"
    )
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz with a text per line")
    parser.add_argument("--work", type=Path, required=True, help="folder of the embedded text, kept for the next time")
    parser.add_argument("--sentences", dest="num_texts", type=int, default=num_texts, help="texts taken of --text")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5])
    parser.add_argument("--global-batch", type=int, default=global_batch)
    parser.add_argument("--micro-batch", type=int, default=micro_batch)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    return parser


def embedded_run(
    work: Path, model: str, text: Path, num_texts: int, *, layers: list[int], max_length: int = 64, ckd: dict[str, Any]
) -> RunConfig:
    """A CKD run in `work`, after its precompute stage, which runs once.

    The student is `layers` of the teacher; nothing is held out, so there is no dev evaluation; the only checkpoint is the last.
    """
    work.mkdir(parents=True, exist_ok=True)
    lines = work / f"{Path(model).name}-{num_texts}.txt"
    if not lines.exists():
        lines.write_text("\n".join(read_texts(text, num_texts)) + "\n", encoding="utf-8")
    config = RunConfig.model_validate(
        {
            "name": lines.stem,
            "runs_dir": str(work),
            "text": {"sources": [{"type": "file", "path": str(lines)}], "held_out": 0},
            "teacher": {
                "model": model,
                "pooling": None if (Path(model) / "modules.json").exists() else "mean",
                "max_length": max_length,
                "tokens_per_batch": 2048,
                "tasks": 2,
            },
            "shards": {"rows": -(-num_texts // 4)},
            "student": {"layers": layers, "max_length": max_length},
            "ckd": {"dev_every": NEVER, "save_every": NEVER} | ckd,
        }
    )
    path = lines.with_suffix(".yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, str(PIPELINE), "--config", str(path), "stages=[precompute]"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return config


def ckd_stage(config: RunConfig) -> CkdStage:
    stage = stage_of(config, "ckd")
    assert isinstance(stage, CkdStage)
    return stage


def build_task(config: RunConfig) -> TeacherKeysTask:
    """The module and data of the CKD stage on this rank, without an engine."""
    stage = ckd_stage(config)
    return stage.build(stage.setup(CPU, autocast_dtype("auto", CPU)))


def delete_training(config: RunConfig) -> None:
    """Deletes the run's trained student; its shards stay."""
    for name in ("ckd", "tensorboard"):
        shutil.rmtree(config.run_dir / name, ignore_errors=True)


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, keeps_freed_memory: bool = True) -> list[Any]:
    """The results, in rank order, of function(rank, world_size, port, *arguments) in a new process per rank.

    keeps_freed_memory: with the allocator settings of the launchers; else with glibc's own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    allocator = keep_freed_memory_in_children() if keeps_freed_memory else nullcontext()
    with allocator, ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, rank, world_size, port, *arguments) for rank in range(world_size)]
        return [future.result() for future in futures]


def join_ranks(rank: int, world_size: int, port: int, threads: int, address: str = "127.0.0.1") -> None:
    """Makes this process a rank, as the launchers do."""
    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=300), auto_mpi_discovery=False, verbose=False)


class StepTimer:
    """Seconds of the parts of each step of the training loop, measured by wrapping what the loop calls.

    align_ranks: a barrier before the gather, so that its time does not include waiting for the slower rank. The time of a part
    that another part calls counts for the inner one alone.
    """

    def __init__(self, *, align_ranks: bool = False) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.seconds: list[defaultdict[str, float]] = []
        self._inner: list[float] = []  # of each part that is running: seconds of the parts inside it
        loop.prefetch = self._batches(loop.prefetch)
        loop.Trainer._step = self._step(loop.Trainer._step)
        gather = self.part("gather", TeacherKeysTask.prepare_step)
        if align_ranks:
            gather = _first(self.part("wait for other ranks", dist.barrier), gather)
        TeacherKeysTask.prepare_step = gather
        TeacherKeysTask.after_step = self.part("push", TeacherKeysTask.after_step)
        training_stage.build_engine = self._engine(training_stage.build_engine)

    def metrics(self, skipped: int) -> dict[str, Any]:
        """Of all steps after the first `skipped`: their number, seconds per step, and each part's fraction of it."""
        counted = self.seconds[skipped:]
        total = self.total_seconds(skipped)
        sums = {name: sum(step[name] for step in counted) for name in sorted({name for step in counted for name in step})}
        sums["rest"] = total - sum(sums.values())
        return {
            "steps": len(counted),
            "seconds_per_step": total / len(counted),
            "fraction_of_step": {name: round(value / total, 4) for name, value in sums.items()},
        }

    def total_seconds(self, skipped: int) -> float:
        """Seconds of all steps after the first `skipped`."""
        return self.ends[-1] - self.starts[skipped]

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is counted under `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds = time.perf_counter() - started
                self.seconds[-1][name] += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        return timed

    def _batches(self, prefetch: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def timed(*arguments: Any, **options: Any) -> Iterator[Any]:
            batches = iter(prefetch(*arguments, **options))
            while True:
                started = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self.starts.append(started)
                self.seconds.append(defaultdict(float, {"input wait": time.perf_counter() - started}))
                yield batch

        return timed

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            try:
                return step(*arguments, **options)
            finally:
                self.ends.append(time.perf_counter())

        return timed

    def _engine(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            engine = build(*arguments, **options)
            for method, name in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
                setattr(engine, method, self.part(name, getattr(engine, method)))
            return engine

        return timed


def _first(before: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **options: Any) -> Any:
        before()
        return function(*arguments, **options)

    return both
