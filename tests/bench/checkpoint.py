"""How long a checkpoint holds up training and how long until it is whole, against DeepSpeed's own, by real ranks under ZeRO 2.

    python tests/bench/checkpoint.py            students of 22M and 110M parameters with random weights
    python tests/bench/checkpoint.py --tiny     the same code on a small one, to see that it runs

ours        Checkpoints.save: `held_up` until it returns, with the copy taken; `whole` until it is written, hashed and committed
deepspeed   engine.save_checkpoint: `held_up` until it returns, `whole` until its files are also flushed; it hashes nothing

The slower rank counts. Both take turns; the medians count. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ckd_run import CPU, join_ranks, on_ranks
from teacher_gpu import BERT_BASE, MINILM, TINY_BERT
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from distill.config import EngineConfig, TrainConfig
from distill.files import flush
from distill.training.checkpoint import Checkpoints
from distill.training.engine import build_engine


class Shrinking(nn.Module):
    """A student whose loss is the size of its parameters: all of them get a gradient, and no time is spent on sentences."""

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
    task = Shrinking(shape)
    train, settings = TrainConfig(micro_batch=1), EngineConfig(deepspeed=Path("configs/deepspeed/zero2.json"))
    engine = build_engine(task, train, settings, num_micro=1, temperature_lr=train.lr)
    checkpoints = Checkpoints(folder / "ours", keep=1, device=CPU, made_of={})
    theirs = folder / "deepspeed"
    seconds: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}

    def time_one(name: str, begin: Any, end: Any) -> None:
        engine.backward(engine())
        engine.step()
        dist.barrier()
        started = time.perf_counter()
        begin()
        held_up = time.perf_counter() - started
        end()
        found = seconds.setdefault(name, {"held_up": [], "whole": []})
        found["held_up"].append(held_up)
        found["whole"].append(time.perf_counter() - started)
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
    return {"seconds": seconds, "bytes": sizes, "parameters": sum(parameter.numel() for parameter in task.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder on the disk that is measured (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    shapes = {"tiny": TINY_BERT} if options.tiny else {"22M": MINILM, "110M": BERT_BASE}
    result: dict[str, Any] = {"ranks": options.ranks, "rounds": options.rounds, "zero_stage": 2}
    for label, shape in shapes.items():
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            ranks = on_ranks(measure_rank, options.ranks, shape, Path(folder), options.rounds)
        figures: dict[str, Any] = {"parameters": ranks[0]["parameters"]}
        for name in ("ours", "deepspeed"):
            slowest = {
                what: [max(values) for values in zip(*(rank["seconds"][name][what] for rank in ranks), strict=True)]
                for what in ("held_up", "whole")
            }
            figures[name] = {f"{what}_seconds": round(statistics.median(values), 4) for what, values in slowest.items()}
            figures[name]["bytes"] = ranks[0]["bytes"][name]
        result[label] = figures
        print(label, json.dumps(figures), flush=True)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
