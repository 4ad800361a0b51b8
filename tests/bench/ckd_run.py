"""What the training benchmarks share: a CKD run whose text is embedded once, a process a rank, and where a step's time goes."""

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
from precompute import as_launched, read_sentences

from distill.config import RunConfig, dump_config
from distill.training import loop, stage
from distill.training.ckd import CkdRecipe

CPU = torch.device("cpu")
PIPELINE = Path(__file__).parents[2] / "launcher" / "pipeline.py"
NEVER = 10**9


def run_parser(description: str | None, *, sentences: int, global_batch: int, micro_batch: int) -> argparse.ArgumentParser:
    """Options of a run of `embedded_run`, with these defaults, and where its figures go."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a sentence-transformers folder: the teacher, and the student's layers")
    made.add_argument("--text", type=Path, required=True, help="a .txt.gz, a sentence a line")
    made.add_argument("--work", type=Path, required=True, help="where the embedded text is kept for the next time")
    made.add_argument("--sentences", type=int, default=sentences)
    made.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5])
    made.add_argument("--global-batch", type=int, default=global_batch)
    made.add_argument("--micro-batch", type=int, default=micro_batch)
    made.add_argument("--out", type=Path, help="where the figures go as JSON")
    return made


def embedded_run(
    work: Path, model: str, text: Path, sentences: int, *, layers: list[int], max_length: int = 64, ckd: dict[str, Any]
) -> RunConfig:
    """A CKD run in `work` whose teacher vectors the pipeline's own precompute has made: once, and kept for the next time.

    The student is `layers` of the teacher; nothing is held out; there is no dev evaluation and no checkpoint but the last.
    """
    work.mkdir(parents=True, exist_ok=True)
    lines = work / f"{Path(model).name}-{sentences}.txt"
    if not lines.exists():
        lines.write_text("\n".join(read_sentences(text, sentences)) + "\n", encoding="utf-8")
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
            "shards": {"rows": -(-sentences // 4)},
            "student": {"layers": layers, "max_length": max_length},
            "ckd": {"dev_every": NEVER, "save_every": NEVER} | ckd,
        }
    )
    path = lines.with_suffix(".yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, str(PIPELINE), "--config", str(path), "stages=[precompute]"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return config


def begin_again(config: RunConfig) -> None:
    """Forgets what was trained; the shards stay."""
    for name in ("ckd", "tensorboard"):
        shutil.rmtree(config.run_dir / name, ignore_errors=True)


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, keeps_memory: bool = True) -> list[Any]:
    """function(rank, world_size, port, *arguments) in a fresh process a rank, as the launchers start theirs or as Python does;
    results in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = as_launched() if keeps_memory else nullcontext()
    with launched, ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
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


class StepClock:
    """Seconds of the parts of each step of the training loop, taken from outside by wrapping what the loop calls.

    together: ranks meet before they gather, so that the gather's time is its own and not that of the slower rank.
    """

    def __init__(self, *, together: bool = False) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.seconds: list[defaultdict[str, float]] = []
        loop.prefetch = self._batches(loop.prefetch)
        loop.Trainer._step = self._step(loop.Trainer._step)
        share = self._part("gather", CkdRecipe.share)
        if together:
            share = _first(self._part("wait for other ranks", dist.barrier), share)
        CkdRecipe.share = share
        CkdRecipe.taken = self._part("push", CkdRecipe.taken)
        stage.build_engine = self._engine(stage.build_engine)

    def figures(self, skipped: int) -> dict[str, Any]:
        """Of all steps after the first `skipped`: their number, seconds a step, and the share of each part in it."""
        counted = self.seconds[skipped:]
        total = self.ends[-1] - self.starts[skipped]
        sums = {name: sum(step[name] for step in counted) for name in sorted({name for step in counted for name in step})}
        sums["rest"] = total - sum(sums.values())
        return {
            "steps": len(counted),
            "seconds_a_step": total / len(counted),
            "share_of_step": {name: round(value / total, 4) for name, value in sums.items()},
        }

    def _batches(self, prefetch: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
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

        return watched

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            try:
                return step(*arguments, **options)
            finally:
                self.ends.append(time.perf_counter())

        return watched

    def _part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[-1][name] += time.perf_counter() - started

        return watched

    def _engine(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            engine = build(*arguments, **options)
            for method, name in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
                setattr(engine, method, self._part(name, getattr(engine, method)))
            return engine

        return watched


def _first(before: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **options: Any) -> Any:
        before()
        return function(*arguments, **options)

    return both
