"""The CKD loss and the direct implementation: seconds of forward and backward, and memory beyond the inputs.

    python tests/bench/loss.py                          1,024 queries against 16,384, 131,072 and 1,048,576 keys of 384
    python tests/bench/loss.py --device cuda --dtype bf16

ours    ckd_loss: tiles of keys, nothing of size B x N, keys of the row's text masked by their ids
naive   the B x N logits, the same mask as a B x N array, torch's cross_entropy; not run if it needs more than half the memory
torch   torch.nn.functional.linear_cross_entropy, where this torch has it, in chunks with as many logits as our tiles, but at
        least 32 rows: each chunk reads all keys, and its default is many times slower on a CPU. It has no mask

The keys get no gradient. Each case runs in a separate process. Memory is the peak of its first run minus what the process held
with the inputs: on a CPU the resident set (VmHWM, reset through clear_refs), on a GPU the allocator's. Then they take turns;
the result is the medians. `stored` are training's types: float32 queries, float16 keys (float32 for the others).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distill.objectives.ckd import ckd_loss
from distill.objectives.key_softmax import DEFAULT_TILE
from distill.run.allocator import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "stored": torch.float32}
FEWEST_ROWS = 32
SAME_TEXT = 100  # one key in this many has a query's text
GOAL_KEYS, GOAL_MEMORY, GOAL_TIME = 131_072, 0.02, 0.75
GOAL_MANY_KEYS, GOAL_BYTES = 1_048_576, 200e6


class Inputs(NamedTuple):
    queries: Tensor
    keys: Tensor
    positives: Tensor
    scale: Tensor
    query_ids: Tensor
    key_ids: Tensor
    tile: int | None


def ours(inputs: Inputs) -> Tensor:
    queries, keys, positives, scale, query_ids, key_ids, tile = inputs
    return ckd_loss(queries, keys, positives, scale=scale, tile=tile, query_ids=query_ids, key_ids=key_ids)


def naive(inputs: Inputs) -> Tensor:
    queries, keys, positives, scale, query_ids, key_ids, _ = inputs
    logits = ((scale.to(queries.dtype) * queries) @ keys.T).float()
    masked = query_ids[:, None] == key_ids[None, :]
    masked[torch.arange(len(queries), device=queries.device), positives] = False
    return functional.cross_entropy(logits.masked_fill_(masked, -torch.inf), positives)


def torch_fused(inputs: Inputs) -> Tensor:
    scaled = inputs.queries * inputs.scale.to(inputs.queries.dtype)
    rows = max(FEWEST_ROWS, len(scaled) * (inputs.tile or DEFAULT_TILE) // len(inputs.keys))
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=min(rows, len(scaled)))
    return functional.linear_cross_entropy(scaled, inputs.keys, inputs.positives, options=options)


LOSSES: dict[str, Callable[[Inputs], Tensor]] = {"ours": ours, "naive": naive, "torch": torch_fused}


def unit_rows(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random unit vectors [count, dim], made in blocks so that little memory is used besides the result."""
    rows = torch.empty(count, dim, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for part in rows.split(8192):
        part.copy_(functional.normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
    return rows


def make_inputs(batch: int, dim: int, num_keys: int, dtype: str, name: str, tile: int | None, device: torch.device) -> Inputs:
    key_dtype = torch.float16 if dtype == "stored" and name == "ours" else DTYPES[dtype]
    keys = unit_rows(num_keys, dim, key_dtype, device)
    positives = torch.arange(batch, device=device)
    noise = unit_rows(batch, dim, torch.float32, device).roll(1, dims=0)
    queries = functional.normalize(keys[:batch].float() + noise, dim=1).to(DTYPES[dtype]).requires_grad_()
    key_ids = torch.arange(num_keys, device=device)
    key_ids[batch::SAME_TEXT] %= batch
    scale = torch.full((1,), 20.0, device=device, requires_grad=True)
    return Inputs(queries, keys, positives, scale, positives.clone(), key_ids, tile)


def run(name: str, inputs: Inputs, device: torch.device) -> tuple[float, float, float]:
    """Seconds, the loss, and the norm of the queries' gradient."""
    inputs.queries.grad = inputs.scale.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    loss = LOSSES[name](inputs)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    assert inputs.queries.grad is not None
    return seconds, loss.item(), inputs.queries.grad.float().norm().item()


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


class Peak:
    """The increase of memory, in bytes, since this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self.held = resident("VmRSS")

    def rise(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident("VmHWM")) - self.held


def work(
    pipe: Connection, name: str, sizes: tuple[int, int, int], dtype: str, tile: int | None, threads: int, place: str
) -> None:
    """A case in a separate process: sends the values of its first run, then the seconds of a run for each True received."""
    torch.set_num_threads(threads)
    device = torch.device(place)
    batch, dim, num_keys = sizes
    for _ in range(2):  # kernels are loaded and threads started
        run(name, make_inputs(64, dim, 512, dtype, name, tile, device), device)
    inputs = make_inputs(batch, dim, num_keys, dtype, name, tile, device)
    peak = Peak(device)
    _, loss, gradient = run(name, inputs, device)
    pipe.send({"extra_bytes": peak.rise(), "loss": loss, "gradient": gradient})
    while pipe.recv():
        pipe.send(run(name, inputs, device)[0])


def available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def measure(names: list[str], sizes: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """The values of each loss at one number of keys."""
    context = multiprocessing.get_context("spawn")
    measured: dict[str, Any] = {}
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        arguments = (theirs, name, sizes, options.dtype, options.tile, options.threads, options.device)
        process = context.Process(target=work, args=arguments)
        process.start()
        theirs.close()
        processes.append(process)
        measured[name] = pipes[name].recv()  # before the next begins: one peak at a time
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return {name: measured[name] | {"seconds": statistics.median(seconds[name])} for name in names}


def goals(cases: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    small = cases.get(GOAL_KEYS, {})
    if isinstance(small.get("naive"), dict):
        for what, goal in (("extra_bytes", GOAL_MEMORY), ("seconds", GOAL_TIME)):
            ratio = small["ours"][what] / small["naive"][what]
            found[f"{what} of naive's at {GOAL_KEYS:,} keys"] = {"goal": goal, "is": round(ratio, 4), "met": ratio <= goal}
    if GOAL_MANY_KEYS in cases:
        extra = cases[GOAL_MANY_KEYS]["ours"]["extra_bytes"]
        found[f"extra bytes at {GOAL_MANY_KEYS:,} keys"] = {"goal": GOAL_BYTES, "is": extra, "met": extra <= GOAL_BYTES}
    return found


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--keys", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--tile", type=int, help="keys held at a time (default: the loss's own)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    has_fused = hasattr(functional, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    cases: dict[int, dict[str, Any]] = {}
    for num_keys in options.keys:
        names, left_out = ["ours"], {}
        # logits, their log-softmax and the gradients of both in float32, and the mask
        needed = options.batch * num_keys * 17
        if needed < available_memory(torch.device(options.device)) / 2:
            names.append("naive")
        else:
            left_out["naive"] = f"not run: it would need about {needed / 1e9:.1f} GB beyond the inputs"
        if has_fused:
            names.append("torch")
        else:
            left_out["torch"] = f"not run: torch {torch.__version__} has no linear_cross_entropy with options"
        values = measure(names, (options.batch, options.dim, num_keys), options)
        if "naive" in values:
            rounding = 2e-2 if options.dtype == "bf16" else 1e-3
            for what in ("loss", "gradient"):
                found, expected = values["ours"][what], values["naive"][what]
                assert abs(found - expected) <= rounding * abs(expected), f"{what} of ours is {found}, of naive {expected}"
        cases[num_keys] = values | left_out
        print(num_keys, json.dumps(cases[num_keys]), flush=True)
    about = {name: getattr(options, name) for name in ("device", "dtype", "batch", "dim", "tile", "threads")}
    result = about | {"torch": torch.__version__, "keys": cases, "goals": goals(cases)}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
