#!/usr/bin/env python3
"""Says what a run will take before anything is spent: memory, bytes on the wire, hours, money, and what to set.

    python launcher/plan.py --config configs/quickstart.yaml                                  this machine
    python launcher/plan.py --config configs/st5_11b.yaml --nodes 8 --gpus-per-node 8 --gpu H100
    python launcher/plan.py --config C --calibrate                  trains for a minute here, to measure what is else assumed
    python launcher/plan.py --config C --nodes 4 --gpus-per-node 8 --gpu A100 --json plan.json ckd.micro_batch=512

Nothing is downloaded, and no weights are read: shapes come from configs/plan/encoders.yaml for well-known names, else from the
config.json of a folder or of what was downloaded before. Rates, links and prices come from configs/plan/devices.yaml, or your
own file of that form (--devices).

The table has a line for each of configs/deepspeed/*.json: the bytes that a rank holds by category, the most rows of a
micro-batch that fit, what a rank receives a step, and a step's time.

Exit codes: 0 the plan is made; 2 the message says what to mend.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
from ranks import meetings, start_process_group

if TYPE_CHECKING:
    from distill.plan.plan import Plan
    from distill.plan.time import Cluster


PATIENCE = 300.0  # seconds that the ranks of a calibration may take
BETWEEN_LOOKS = 0.02  # seconds


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
    cluster = Cluster(arguments.nodes, ranks, name, device, table.assumed, is_bf16)
    if arguments.calibrate:
        from distill.plan.calibrate import check_device

        check_device(cluster, table.named(here)[0], on_gpu or os.cpu_count() or 1)
    return cluster


def measure(config: command.RunConfig, ranks: int) -> list[dict[str, Any]]:
    """What each of so many ranks on this machine did in a minute of training; each is this script again."""
    from distill.config import dump_config

    folder = config.run_dir
    path = folder / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))} | dict(os.environ)
    run_ranks([sys.executable, __file__, "--config", str(path), "--as-rank", str(folder)], shared, ranks, folder, PATIENCE)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def run_ranks(asked: list[str], shared: dict[str, str], ranks: int, folder: Path, patience: float) -> None:
    """Runs a command on so many ranks, which print into `folder`, until all have ended.

    Raises ValueError with the last line of the first that fails, or if they take more than `patience` seconds.
    """
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + patience
    try:
        for log, own in zip(logs, meetings(ranks), strict=True):
            with log.open("wb") as file:
                processes.append(subprocess.Popen(asked, env=shared | own, stdout=file, stderr=subprocess.STDOUT))
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(BETWEEN_LOOKS)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # of several within a look, the one that knows why: the others have lost it
    failed = sorted((rank for rank, code in enumerate(codes) if code), key=lambda rank: codes[rank] != command.MENDED_BY_USER)
    if failed:
        said = last_line(logs[failed[0]]) or f"exit code {codes[failed[0]]}, and nothing was printed"
        raise ValueError(f"calibration failed here, on rank {failed[0]}: {said}")
    if None in codes:
        raise ValueError(
            f"calibration took more than {patience:g} s here and was ended: try a smaller global_batch, or plan without"
            f" --calibrate; rank {codes.index(None)} printed last: {last_line(logs[codes.index(None)]) or 'nothing'}"
        )


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


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


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return None  # lengths are assumed then, and the plan says so


def positive(text: str) -> int:
    """argparse's type of numbers of things."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines (1)")
    parser.add_argument("--gpus-per-node", type=positive, metavar="G", help="devices of each, a rank on each (those here)")
    parser.add_argument("--gpu", metavar="NAME", help="a device of the table, e.g. H100, A100, L4, cpu (that of this machine)")
    parser.add_argument("--devices", type=Path, metavar="FILE", help="instead of configs/plan/devices.yaml")
    parser.add_argument("--sentences", type=positive, metavar="N", help="of the text, where they cannot be counted")
    parser.add_argument("--tokens", type=float, metavar="N", help="of a sentence, where they are not to be sampled")
    parser.add_argument("--calibrate", action="store_true", help="measure rates here for a minute instead of assuming them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures: bytes, seconds, dollars, operations")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
