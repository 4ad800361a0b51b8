#!/usr/bin/env python3
"""Estimates what a run takes before it starts: memory, communication, hours and dollars; and advises settings.

    python launcher/plan.py --config configs/quickstart.yaml                                  this machine
    python launcher/plan.py --config configs/st5_11b.yaml --nodes 8 --gpus-per-node 8 --gpu H100
    python launcher/plan.py --config C --calibrate                  trains for a minute here, to measure the assumed rates
    python launcher/plan.py --config C --nodes 4 --gpus-per-node 8 --gpu A100 --json plan.json ckd.micro_batch=512

Nothing is downloaded, and no weights are read: architectures come from configs/plan/encoders.yaml, a folder's config.json, or
the hub's cache. The server of a teacher behind an endpoint is sent a few short texts, unless precompute has begun. Rates, links
and prices come from configs/plan/devices.yaml, or from your own file of that form (--devices).

The table has a line for each of configs/deepspeed/*.json: the bytes that a rank holds by category, the largest micro-batch that
fits, the bytes that a rank receives per step, and the time of a step.

Exit codes: 0 the plan is made; 2 the message says what to fix.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    return command.run(lambda: plan(arguments), show_traceback=arguments.traceback)


def plan(arguments: argparse.Namespace) -> int:
    from distill.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    command.set_up_libraries()
    from distill.plan.devices import find_cluster, load_devices
    from distill.plan.plan_text import format_plan
    from distill.plan.planner import collect_inputs, make_plan
    from distill.run.files import write_json

    table = load_devices(arguments.devices)
    cluster = find_cluster(config, table, nodes=arguments.nodes, ranks_per_node=arguments.gpus_per_node, name=arguments.gpu)
    inputs = collect_inputs(config, cluster, tokens_per_text=arguments.tokens, num_texts=arguments.sentences)
    measured = None
    if arguments.calibrate:
        from distill.plan.calibration import calibrate, check_local, run_ranks

        check_local(inputs, table)
        from launcher.rendezvous import local_environments, start_process_group

        print(f"calibrating on {cluster.ranks_per_node} ranks for about a minute", file=sys.stderr, flush=True)
        environments = local_environments(cluster.ranks_per_node)
        inputs, measured = calibrate(inputs, partial(run_ranks, environments=environments, join=start_process_group))
    planned = make_plan(inputs, measured)
    print(format_plan(planned, config))
    if arguments.json:
        write_json(arguments.json, asdict(planned))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument("--nodes", type=positive_integer, default=1, metavar="N", help="machines (1)")
    parser.add_argument(
        "--gpus-per-node", type=positive_integer, metavar="G", help="devices per node, a rank on each (those here)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="a device of the table, e.g. H100, A100, L4, cpu (that of this machine)")
    parser.add_argument("--devices", type=command.path, metavar="FILE", help="instead of configs/plan/devices.yaml")
    parser.add_argument("--sentences", type=positive_integer, metavar="N", help="number of texts, where they cannot be counted")
    parser.add_argument("--tokens", type=float, metavar="N", help="tokens per text, instead of sampling or assuming them")
    parser.add_argument("--calibrate", action="store_true", help="measure rates here for a minute instead of assuming them")
    parser.add_argument("--json", type=command.path, metavar="FILE", help="write all values: bytes, seconds, dollars, FLOPs")
    return parser


def positive_integer(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


if __name__ == "__main__":
    command.start(main)
