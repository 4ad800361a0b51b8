"""Bytes that a CKD step sends between two ranks, against the design's formula, and the gather's fraction of a step's time.

    python tests/bench/communication.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work DIR
    ... --rate 100mbit --steps 6      over a slow link: the rate of each direction (tc's token bucket)

It needs root. Two network namespaces are joined by a veth pair, with a rank in each, and gloo uses the veth. The bytes that a
rank's interface received are read from the kernel's counters:

gather   Task.prepare_step alone, repeated: keys and ids, by the formula (W-1)/W x G x (2 d_t + 8)
reduce   the sum over ranks of a float32 vector as long as the student's gradient, as ZeRO 0 sends it, for comparison
step     whole steps of the training loop; the rest is gradients, parameters and sums of logged values

The kernel also counts headers: 14 bytes of Ethernet, 20 of IPv4 and 32 of TCP in each packet, also in those that only
acknowledge, and the headers of gloo. A veth carries packets of up to 64 KB; a link with an MTU of 1,500 adds 66 bytes to every
1,448.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from ckd_run import CPU, StepTimer, build_task, ckd_stage, delete_training, embedded_run, join_ranks, on_ranks, run_parser

from distill.config import RunConfig
from distill.training import loop

CLONE_NEWNET = 0x40000000
WORLD_SIZE = 2
INTERFACE = "veth"
FIRST_STEPS = 2  # in which connections are made; not counted
REDUCES = 3
QUIET = 0.5  # seconds for acknowledgements that are under way
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}  # bits per second
GOAL_BYTES, GOAL_TIME = 0.05, 0.03


class Counters(NamedTuple):
    """What an interface has received so far."""

    bytes: int
    packets: int


@contextmanager
def joined_namespaces(first_address: str, second_address: str, rate: str | None = None) -> Iterator[list[str]]:
    """Two network namespaces with an interface `veth` in each, joined; removed at the end. `rate`: as tc writes it, 100mbit."""
    names = [f"distill-{os.getpid()}-{number}" for number in range(2)]

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)

    def ip(*arguments: str) -> None:
        run("ip", *arguments)

    try:
        for name in names:
            ip("netns", "add", name)
        peer = ["peer", "name", INTERFACE, "netns", names[1]]
        ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", *peer)
        for name, address in zip(names, (first_address, second_address), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
            if rate is not None:
                bucket = ["rate", rate, "burst", "64kb", "latency", "200ms"]
                run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *bucket)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def enter(namespace: str) -> None:
    """Moves this process, which must not have another thread that uses the network, into a network namespace."""
    with Path("/run/netns", namespace).open(encoding="utf-8") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the network namespace", namespace)


def received() -> Counters:
    """The counters of the veth in this process's namespace."""
    lines = Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines()
    fields = next(line for line in lines if line.strip().startswith(f"{INTERFACE}:")).split(":")[1].split()
    return Counters(int(fields[0]), int(fields[1]))


def counted(before: Counters, after: Counters, times: int) -> dict[str, Any]:
    """The difference, divided by `times`."""
    return {
        "bytes_received": round((after.bytes - before.bytes) / times, 1),
        "packets_received": round((after.packets - before.packets) / times, 1),
    }


def measured(act: Callable[[int], object], times: int) -> dict[str, Any]:
    """Bytes, packets and milliseconds of one call of act on this rank, where all ranks call act(0), act(1) ... together."""
    dist.barrier()
    time.sleep(QUIET)
    before, started = received(), time.perf_counter()
    for number in range(times):
        act(number)
    dist.barrier()
    seconds = time.perf_counter() - started
    time.sleep(QUIET)
    return counted(before, received(), times) | {"milliseconds": round(1000 * seconds / times, 2)}


def join(rank: int, world_size: int, port: int, addresses: tuple[str, str], namespaces: list[str]) -> None:
    enter(namespaces[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    join_ranks(rank, world_size, port, 1, addresses[0])


def alone_rank(
    rank: int, world_size: int, port: int, addresses: tuple[str, str], namespaces: list[str], config: RunConfig, times: int
) -> dict[str, dict[str, Any]]:
    """The gather of a step's keys alone, and the sum of a step's gradients alone."""
    join(rank, world_size, port, addresses, namespaces)
    task = build_task(config)
    steps = [task.load(step) for step in range(min(4, task.steps_per_epoch))]

    def prepare(number: int) -> None:
        step = number % len(steps)
        task.prepare_step(step, steps[step], is_logged=False)

    for step in range(len(steps)):
        prepare(step)
    gather = measured(prepare, times)
    width, others = steps[0][0].teacher.shape[1], (world_size - 1) / world_size
    gather["bytes_by_formula"] = others * config.train("ckd").global_batch * (2 * width + 8)
    gather["relative_error"] = round(gather["bytes_received"] / gather["bytes_by_formula"] - 1, 4)
    gradient = torch.zeros(sum(p.numel() for p in task.module.parameters() if p.requires_grad))
    reduce = measured(lambda _: dist.all_reduce(gradient), REDUCES)
    reduce["bytes_by_formula"] = 2 * others * gradient.nbytes
    dist.destroy_process_group()
    return {"gather": gather, "reduce": reduce}


def step_rank(
    rank: int, world_size: int, port: int, addresses: tuple[str, str], namespaces: list[str], config: RunConfig
) -> dict[str, Any]:
    """What a rank receives in a whole step of the loop, and the time of the step's parts."""
    join(rank, world_size, port, addresses, namespaces)
    step = loop.Trainer._step
    counters: list[Counters] = []

    def counting(trainer: loop.Trainer, *arguments: Any) -> Any:
        counters.append(received())
        return step(trainer, *arguments)

    loop.Trainer._step = counting
    timer = StepTimer(align_ranks=True)
    ckd_stage(config).run(CPU)
    dist.destroy_process_group()
    # from the start of the first counted step to the start of the last
    return counted(counters[FIRST_STEPS], counters[-1], len(counters) - 1 - FIRST_STEPS) | timer.metrics(FIRST_STEPS)


def bits_per_second(rate: str) -> float:
    return float(rate[:-4]) * UNITS[rate[-4:]]


def main() -> None:
    parser = run_parser(__doc__, num_texts=20_000, global_batch=1024, micro_batch=256)
    parser.add_argument("--queue", type=int, default=16_384)
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="the ZeRO stage of the whole steps")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--gathers", type=int, default=200)
    parser.add_argument(
        "--addresses", nargs=2, default=["10.231.0.1", "10.231.0.2"], help="addresses of the two ends, in one /24 network"
    )
    parser.add_argument("--rate", help="of the link in each direction, e.g. 100mbit; default: no limit")
    options = parser.parse_args()
    ckd = {"global_batch": options.global_batch, "micro_batch": options.micro_batch, "queue": options.queue}
    config = embedded_run(
        options.work,
        options.model,
        options.text,
        options.num_texts,
        layers=options.layers,
        ckd=ckd | {"epochs": 1e6, "max_steps": options.steps},
    )
    engine = config.engine.model_copy(update={"deepspeed": Path(f"configs/deepspeed/zero{options.zero}.json")})
    config = config.model_copy(update={"engine": engine})
    delete_training(config)
    addresses = tuple(options.addresses)
    try:
        with joined_namespaces(*addresses, options.rate) as namespaces:
            alone = on_ranks(alone_rank, WORLD_SIZE, addresses, namespaces, config, options.gathers)
            steps = on_ranks(step_rank, WORLD_SIZE, addresses, namespaces, config)
    except subprocess.CalledProcessError as error:
        sys.exit(f"no network namespaces here ({error.stderr.strip()}): this needs root and iproute2")
    gathers, reduces = ([rank[name] for rank in alone] for name in ("gather", "reduce"))
    goals = {}
    if options.rate is None:
        error = max(abs(rank["relative_error"]) for rank in gathers)
        fraction = max(rank["fraction_of_step"]["gather"] + rank["fraction_of_step"]["push"] for rank in steps)
        goals = {
            "relative error of the gather's bytes": {"goal": GOAL_BYTES, "is": error, "met": error <= GOAL_BYTES},
            "gather and push, fraction of a step": {"goal": GOAL_TIME, "is": round(fraction, 4), "met": fraction <= GOAL_TIME},
        }
    else:  # the packets of the token bucket are those of an MTU of 1,500
        for each in (*gathers, *reduces):
            each["milliseconds_by_formula"] = round(8e3 * each["bytes_by_formula"] / bits_per_second(options.rate), 2)
    result = {
        **ckd,
        "world_size": WORLD_SIZE,
        "rate": options.rate,
        "zero": options.zero,
        "gather": gathers,
        "reduce": reduces,
        "step": steps,
        "goals": goals,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
