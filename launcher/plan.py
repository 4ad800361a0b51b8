#!/usr/bin/env python3
"""Says what a run will take before anything is spent: memory, bytes on the wire, hours, money, and what to set.

    python launcher/plan.py --config configs/quickstart.yaml                                  this machine
    python launcher/plan.py --config configs/st5_11b.yaml --nodes 8 --gpus-per-node 8 --gpu H100
    python launcher/plan.py --config C --calibrate                  trains for a minute here, to measure what is else assumed
    python launcher/plan.py --config C --nodes 4 --gpus-per-node 8 --gpu A100 --json plan.json ckd.micro_batch=512

Nothing is downloaded, and no weights are read: shapes come from a folder's config.json, or from configs/plan/encoders.yaml for
well-known names. Rates, links and prices come from configs/plan/devices.yaml, or your own file of that form (--devices).

The table has a line for each of configs/deepspeed/*.json: the bytes that a rank holds by category, the most rows of a
micro-batch that fit, what a rank receives a step, and a step's time.

Exit codes: 0 the plan is made; 2 the message says what to mend.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
from ranks import start_process_group

if TYPE_CHECKING:
    from distill.plan.plan import Plan
    from distill.plan.time import Cluster


PATIENCE = 300.0  # seconds


def main() -> int:
    if arguments.as_rank:
        return as_rank(arguments.as_rank)
    config = command.config_of(arguments)
    command.quiet_libraries()
    from distill.plan.corpus import look_at_corpus
    from distill.plan.figures import to_json
    from distill.plan.plan import make_plan, models_of
    from distill.plan.table import show

    cluster = cluster_of(config)
    models = models_of(config)
    folder = models.student.folder
    tokenizer = tokenizer_of(folder) if folder else None
    corpus = look_at_corpus(config, cluster.assumed, tokenizer, tokens=arguments.tokens, count=arguments.sentences)
    plan: Plan = make_plan(config, cluster, corpus, models)
    if arguments.calibrate:
        from distill.plan.calibrate import calibrated

        plan = calibrated(plan, lambda line: print(f"plan: {line}", file=sys.stderr, flush=True), measure)
    print(show(plan))
    if arguments.json:
        from distill.files import write_json

        write_json(arguments.json, to_json(plan))
    return 0


def cluster_of(config: command.RunConfig) -> Cluster:
    """The devices that are asked for; by default those of this machine."""
    import torch

    from distill.plan.devices import load_devices
    from distill.plan.time import Cluster
    from distill.precision import autocast_dtype

    table = load_devices(arguments.devices)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name, device = table.named(arguments.gpu or here)
    on_gpu = torch.cuda.device_count()
    ranks = arguments.gpus_per_node or (on_gpu if name != "cpu" and on_gpu else config.engine.num_ranks or 2)
    is_here = name == "cpu" and arguments.gpu is None
    precision = config.engine.precision
    is_bf16 = autocast_dtype(precision, torch.device("cpu")) is not None if is_here else precision != "fp32"
    if is_here:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
        device = device.model_copy(update={"memory": memory})
    return Cluster(arguments.nodes, ranks, name, device, table.assumed, is_bf16)


def measure(config: command.RunConfig, ranks: int) -> list[dict[str, Any]]:
    """What each of so many ranks on this machine did in a minute of training; each is this script again."""
    from distill.config import dump_config

    path = config.run_dir / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    threads = max(1, (os.cpu_count() or 1) // ranks)
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    asked = [sys.executable, __file__, "--config", str(path), "--as-rank", str(config.run_dir)]
    processes = [
        subprocess.Popen(
            asked,
            env={"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [text for text, process in zip(said, processes, strict=True) if process.returncode]
    if failed:
        raise ValueError(f"calibration failed here: {failed[0].strip().splitlines()[-1].removeprefix('error: ')}")
    return [json.loads((config.run_dir / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def as_rank(folder: Path) -> int:
    """One rank of the calibration."""
    import torch

    config = command.config_of(arguments)
    command.quiet_libraries()
    command.end_with_parent()
    device = start_process_group(config.engine.timeout)
    from distill.plan.calibrate import run_rank

    found = run_rank(config, device)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return None  # lengths are assumed then, and the plan says so


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="devices of each, a rank on each (those here)")
    parser.add_argument("--gpu", metavar="NAME", help="a device of the table, e.g. H100, A100, L4, cpu (that of this machine)")
    parser.add_argument("--devices", type=Path, metavar="FILE", help="instead of configs/plan/devices.yaml")
    parser.add_argument("--sentences", type=int, metavar="N", help="of the text, where they cannot be counted")
    parser.add_argument("--tokens", type=float, metavar="N", help="of a sentence, where they are not to be sampled")
    parser.add_argument("--calibrate", action="store_true", help="measure rates here for a minute instead of assuming them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures: bytes, seconds, dollars, operations")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
