"""Seconds that training waits for a checkpoint, and until it is complete, compared with DeepSpeed's own, under ZeRO 2.

    python tests/bench/checkpoint.py            students of 22M and 110M parameters with random weights
    python tests/bench/checkpoint.py --tiny     the same code on a small one, to see that it runs

ours        Checkpoints.save: `wait` until it returns with the copy taken; `complete` until it is written, hashed and committed
deepspeed   engine.save_checkpoint: `wait` until it returns, `complete` until its files are also flushed; it hashes nothing

Each value is the slower rank's. Both take turns; the result is the medians. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ckd_run import CPU, join_ranks, on_ranks
from teacher_gpu import BERT_BASE, MINILM, TINY_BERT
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from distill.run.files import flush
from distill.training.checkpoint import Checkpoints
from distill.training.engine import build_engine
from distill.training.train_config import EngineConfig, TrainConfig


class ParameterNorm(nn.Module):
    """A student whose loss is the squared norm of its parameters: each gets a gradient, and no text is encoded."""

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        self.student = BertModel(BertConfig(**shape), add_pooling_layer=False)

    def forward(self) -> Tensor:
        return sum((parameter.square().sum() for parameter in self.parameters()), start=next(self.parameters()).new_zeros(()))


def saved_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_rank(rank: int, world_size: int, port: int, shape: dict[str, int], folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each round on this rank, the bytes of one checkpoint, and the parameters in it."""
    join_ranks(rank, world_size, port, 1)
    module = ParameterNorm(shape)
    train, settings = TrainConfig(micro_batch=1), EngineConfig(deepspeed=Path("configs/deepspeed/zero2.json"))
    engine = build_engine(module, train, settings, num_micro=1, temperature_lr=train.lr)
    checkpoints = Checkpoints(folder / "ours", keep=1, device=CPU, must_match={})
    theirs = folder / "deepspeed"
    seconds: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}

    def time_one(name: str, save: Callable[[], object], wait: Callable[[], object]) -> None:
        engine.backward(engine())
        engine.step()
        dist.barrier()
        started = time.perf_counter()
        save()
        waited = time.perf_counter() - started
        wait()
        found = seconds.setdefault(name, {"wait": [], "complete": []})
        found["wait"].append(waited)
        found["complete"].append(time.perf_counter() - started)
        dist.barrier()
        sizes[name] = saved_bytes(folder / name)
        dist.barrier()

    def flush_theirs() -> None:
        dist.barrier()
        if rank == 0:
            for path in theirs.rglob("*"):
                flush(path)
        dist.barrier()

    for step in range(1, rounds + 1):
        time_one("ours", lambda step=step: checkpoints.save(engine, step, {"step": step}), checkpoints.wait)
        time_one("deepspeed", lambda: engine.save_checkpoint(str(theirs), tag="state", save_latest=False), flush_theirs)
        if rank == 0:
            shutil.rmtree(theirs)
        dist.barrier()
    dist.destroy_process_group()
    return {"seconds": seconds, "bytes": sizes, "parameters": sum(parameter.numel() for parameter in module.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, help="a folder on the disk that is measured (default: the system's temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    shapes = {"tiny": TINY_BERT} if options.tiny else {"22M": MINILM, "110M": BERT_BASE}
    result: dict[str, Any] = {"ranks": options.ranks, "rounds": options.rounds, "zero_stage": 2}
    for label, shape in shapes.items():
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            ranks = on_ranks(measure_rank, options.ranks, shape, Path(folder), options.rounds)
        values: dict[str, Any] = {"parameters": ranks[0]["parameters"]}
        for name in ("ours", "deepspeed"):
            slowest = {
                what: [max(each) for each in zip(*(rank["seconds"][name][what] for rank in ranks), strict=True)]
                for what in ("wait", "complete")
            }
            values[name] = {f"{what}_seconds": round(statistics.median(each), 4) for what, each in slowest.items()}
            values[name]["bytes"] = ranks[0]["bytes"][name]
        result[label] = values
        print(label, json.dumps(values), flush=True)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
