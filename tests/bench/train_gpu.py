"""Training on a GPU: tokens per second and model FLOP utilisation of a CKD step, and the loss against millions of keys.

    python tests/bench/train_gpu.py             a student of BERT-base's size with random weights, on random tokens of length 64
    python tests/bench/train_gpu.py --tiny      the same code, small, to see that it runs, also on a CPU

A step is forward, loss against the batch's keys and a full queue, backward and AdamW, in bf16 over float32 parameters: alone,
and in the DeepSpeed engine where that is installed. MFU counts three times the FLOPs of the student's forward pass and none of
the loss, relative to a large bf16 matrix product on the same device in the same run. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import measure
from teacher_gpu import BERT_BASE, TINY_BERT, keep, tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from distill.objectives.queue import KeyQueue
from distill.run.precision import autocast_dtype
from distill.run.throughput import matmul_peak
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.teacher.encoder import PACKED_FLOPS
from distill.training.batches import MicroBatch
from distill.training.keys import Keys
from distill.training.task import StepContext
from distill.training.tasks.ckd import CkdConfig
from distill.training.teacher_keys import TeacherKeysModule
from distill.training.train_config import EngineConfig

Step = Callable[[MicroBatch, StepContext], None]
LENGTH = 64
VOCABULARY = 30_522  # of BERT; the tokenizer is not used
LR = 1e-4


def build_module(shape: dict[str, int], queue: int, tile: int, device: torch.device) -> TeacherKeysModule:
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=VOCABULARY, **shape), add_pooling_layer=False)
    set_dropout(encoder, 0.0)
    student = Student(encoder, tokenizer(), pooling="mean", max_length=LENGTH)
    config = CkdConfig(global_batch=2, queue=queue, tile=tile, lr=LR)
    return TeacherKeysModule(student, None, config, autocast_dtype("bf16", device)).to(device).train()


def make_batch(rows: int, width: int, queue: int, device: torch.device) -> tuple[MicroBatch, StepContext]:
    """Random tokens without padding and random teacher vectors, and a step whose queue is full."""

    def directions(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, width, device=device), dim=1).half()

    ids = torch.randint(1, VOCABULARY, (rows, LENGTH), device=device)
    tokens = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    hashes = torch.arange(rows, device=device)
    micro = MicroBatch(tokens, torch.arange(rows, device=device), directions(rows), hashes, rows)
    ring = KeyQueue(queue, width, device)
    ring.push(directions(queue), torch.arange(rows, rows + queue, device=device))
    return micro, StepContext(0, keys=Keys(micro.teacher, hashes, ring, False))


def plain_step(module: TeacherKeysModule) -> Step:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def step(micro: MicroBatch, context: StepContext) -> None:
        loss, _ = module(micro, context)
        (loss / len(micro.positions)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(module: TeacherKeysModule, rows: int, device: torch.device) -> Step:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    from distill.training.engine import build_engine

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    train = CkdConfig(global_batch=rows, micro_batch=rows, queue=0, lr=LR)
    settings = EngineConfig(deepspeed=Path("configs/deepspeed/zero0.json"))
    engine = build_engine(module, train, settings, num_micro=1, temperature_lr=LR)

    def step(micro: MicroBatch, context: StepContext) -> None:
        loss, _ = engine(micro, context)
        engine.backward(loss / len(micro.positions))
        engine.step()

    return step


def seconds_per_step(step: Step, batch: tuple[MicroBatch, StepContext], device: torch.device, steps: int) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step(*batch)
    synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step(*batch)
    synchronize()
    return (time.perf_counter() - started) / steps


def forward_flops(module: TeacherKeysModule, micro: MicroBatch) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=PACKED_FLOPS)
    with torch.no_grad(), counter:
        module.embed(micro)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--queue", type=int, default=65_536)
    parser.add_argument("--keys", type=int, nargs="+", default=[1 << 20, 1 << 23], help="of the loss alone")
    parser.add_argument(
        "--tiles", type=int, nargs="+", default=[4096, 65_536], help="keys held at a time; steps take the largest"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="of the loss alone")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tiny:
        options.micro_batches, options.queue, options.keys, options.steps, options.rounds = [16, 32], 256, [1 << 12], 3, 2
    elif device.type == "cpu":
        raise SystemExit("there is no GPU here; --tiny runs the same code on a small student")
    peak = matmul_peak(device, torch.bfloat16, seconds=2.0)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "matmul_peak_tflops": round(peak / 1e12, 2),
        "steps": {},
        "loss": {},
    }
    width = (TINY_BERT if options.tiny else BERT_BASE)["hidden_size"]
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    for rows in options.micro_batches:
        batch = make_batch(rows, width, options.queue, device)
        for name in ("plain", "engine") if has_deepspeed else ("plain",):
            module = build_module(TINY_BERT if options.tiny else BERT_BASE, options.queue, max(options.tiles), device)
            flops = forward_flops(module, batch[0])
            step = plain_step(module) if name == "plain" else engine_step(module, rows, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = seconds_per_step(step, batch, device, options.steps)
            metrics = {
                "tokens_per_second": round(rows * LENGTH / seconds),
                "texts_per_second": round(rows / seconds, 1),
                "tflops": round(3 * flops / seconds / 1e12, 2),
                "mfu": round(3 * flops / seconds / peak, 3),
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
            }
            if device.type == "cuda":
                metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            result["steps"][f"{name}, {rows} texts"] = metrics
            print(name, rows, metrics, flush=True)
            keep(result, options.out)
            del module, step
            gc.collect()  # an engine is a cycle of references
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del batch
    shared = {"device": device.type, "dtype": "stored", "threads": os.cpu_count(), "rounds": options.rounds}
    for num_keys, tile in itertools.product(options.keys, options.tiles):
        metrics = measure(["ours"], (1024, width, num_keys), argparse.Namespace(**shared, tile=tile))["ours"]
        result["loss"][f"1024 queries, {num_keys} keys of {width}, tiles of {tile}"] = metrics
        print(num_keys, tile, metrics, flush=True)
        keep(result, options.out)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
