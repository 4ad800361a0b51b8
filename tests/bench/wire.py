"""Bytes that a CKD step sends between two ranks, against the design's formula, and the gather's share of a step's time.

    python tests/bench/wire.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench     (as root)

Two network namespaces joined by a veth pair, one rank in each, gloo over the veth. Counted are the bytes that the kernel says a
rank's interface received:

gather   recipe.share alone, many times over: what a rank receives of keys and ids, by the formula (W-1)/W x G x (2 d_t + 8)
step     whole steps of the training loop; the rest is gradients, parameters and sums of what is logged

The kernel's count has more in it than the keys and ids: 14 bytes of Ethernet, 20 of IPv4 and 32 of TCP a packet, the same for
each packet that only acknowledges, and gloo's own headers. A veth carries packets of up to 64 KB; a link with an MTU of 1,500
adds 66 bytes to every 1,448.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from ckd_run import CPU, StepClock, begin_again, embedded_run, join_ranks, on_ranks

from distill.config import RunConfig
from distill.precision import autocast_dtype
from distill.training import loop
from distill.training.stage import build_recipe, run_stage

CLONE_NEWNET = 0x40000000
WORLD_SIZE = 2
INTERFACE = "veth"
FIRST_STEPS = 2  # in which connections are made; not counted
GOAL_BYTES, GOAL_TIME = 0.05, 0.03


class Counters(NamedTuple):
    """What an interface has received so far."""

    bytes: int
    packets: int


@contextmanager
def joined_namespaces(first_address: str, second_address: str) -> Iterator[list[str]]:
    """Two network namespaces with an interface `veth` in each, joined; removed at the end."""
    names = [f"distill-{os.getpid()}-{number}" for number in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, stderr=subprocess.PIPE, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        peer = ["peer", "name", INTERFACE, "netns", names[1]]
        ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", *peer)
        for name, address in zip(names, (first_address, second_address), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def enter(namespace: str) -> None:
    """Moves this process, which must have no other thread yet that speaks to the network, into a network namespace."""
    with Path("/run/netns", namespace).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the network namespace", namespace)


def received() -> Counters:
    """Of the veth, in the namespace this process is in."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith(f"{INTERFACE}:")).split(":")[1].split()
    return Counters(int(fields[0]), int(fields[1]))


def counted(before: Counters, after: Counters, times: int) -> dict[str, Any]:
    return {
        "bytes_received": round((after.bytes - before.bytes) / times, 1),
        "packets_received": round((after.packets - before.packets) / times, 1),
    }


def join(rank: int, world_size: int, port: int, addresses: tuple[str, str], namespaces: list[str]) -> None:
    enter(namespaces[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    join_ranks(rank, world_size, port, 1, addresses[0])


def gather_rank(
    rank: int, world_size: int, port: int, addresses: tuple[str, str], namespaces: list[str], config: RunConfig, times: int
) -> dict[str, Any]:
    """What a rank receives when the keys of a step are gathered, and nothing else happens."""
    join(rank, world_size, port, addresses, namespaces)
    recipe = build_recipe(config, "ckd", config.run_dir / "ckd", CPU, autocast_dtype("auto", CPU))
    steps = [recipe.load(step) for step in range(min(4, recipe.steps_per_epoch))]
    for step, micro in enumerate(steps):
        recipe.share(step, micro)
    dist.barrier()
    time.sleep(0.5)  # for acknowledgements that are under way
    before = received()
    for step, micro in enumerate(islice(cycle(steps), times)):
        recipe.share(step, micro)
    dist.barrier()
    time.sleep(0.5)
    figures = counted(before, received(), times)
    dist.destroy_process_group()
    width = steps[0][0].teacher.shape[1]
    formula = (world_size - 1) * config.ckd.global_batch * (2 * width + 8) / world_size
    return figures | {"formula": formula, "over_formula": round(figures["bytes_received"] / formula - 1, 4)}


def step_rank(
    rank: int, world_size: int, port: int, addresses: tuple[str, str], namespaces: list[str], config: RunConfig
) -> dict[str, Any]:
    """What a rank receives in a whole step of the loop, and where the step's time goes."""
    join(rank, world_size, port, addresses, namespaces)
    step = loop.Trainer._step
    counters: list[Counters] = []

    def counting(trainer: loop.Trainer, *arguments: Any) -> Any:
        counters.append(received())
        return step(trainer, *arguments)

    loop.Trainer._step = counting
    clock = StepClock(together=True)
    run_stage(config, "ckd", CPU)
    dist.destroy_process_group()
    # from the beginning of one step to that of the last
    return counted(counters[FIRST_STEPS], counters[-1], len(counters) - 1 - FIRST_STEPS) | clock.figures(FIRST_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a sentence-transformers folder: the teacher, and the student's layers")
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz, a sentence a line")
    parser.add_argument("--work", type=Path, required=True, help="where the embedded text is kept for the next time")
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5])
    parser.add_argument("--global-batch", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--queue", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--gathers", type=int, default=200)
    parser.add_argument(
        "--addresses", nargs=2, default=["10.231.0.1", "10.231.0.2"], help="of the two ends; of one /24 network"
    )
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    ckd = {"global_batch": options.global_batch, "micro_batch": options.micro_batch, "queue": options.queue}
    config = embedded_run(
        options.work,
        options.model,
        options.text,
        options.sentences,
        layers=options.layers,
        ckd=ckd | {"epochs": 1e6, "max_steps": options.steps},
    )
    begin_again(config)
    addresses = tuple(options.addresses)
    try:
        with joined_namespaces(*addresses) as namespaces:
            gathers = on_ranks(gather_rank, WORLD_SIZE, addresses, namespaces, config, options.gathers)
            steps = on_ranks(step_rank, WORLD_SIZE, addresses, namespaces, config)
    except subprocess.CalledProcessError as error:
        sys.exit(f"no network namespaces here ({error.stderr.strip()}): this needs root and iproute2")
    worst = max(abs(rank["over_formula"]) for rank in gathers)
    share = max(rank["share_of_step"]["gather"] + rank["share_of_step"]["push"] for rank in steps)
    result = {
        **ckd,
        "world_size": WORLD_SIZE,
        "gather": gathers,
        "step": steps,
        "goals": {
            "gather's bytes against the formula": {"goal": GOAL_BYTES, "is": worst, "met": worst <= GOAL_BYTES},
            "gather and push of a step's time": {"goal": GOAL_TIME, "is": round(share, 4), "met": share <= GOAL_TIME},
        },
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
