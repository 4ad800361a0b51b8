"""Planned bytes against those of a real training step: held and received, on real ranks and on one of up to 4,096 fake ones."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import write_set
from conftest import sentences
from distributed_ranks import on_ranks
from plan.counted import CPU, NEVER, count_step, start_deepspeed, start_fake

from distill.config import RunConfig, load_config
from distill.plan.architectures import architecture_of
from distill.plan.devices import load_devices
from distill.plan.planner import typical_batch
from distill.plan.shapes import Chunks, TaskShape, task_shape
from distill.plan.step_cost import bytes_received, collectives_per_step, rank_memory
from distill.plan.text_estimate import TextEstimate, estimate_text
from distill.plan.zero_partition import ZeroSettings
from distill.run.precision import autocast_dtype
from distill.teacher.identity import named_settings

CATEGORIES = ("parameters", "gradients", "optimizer", "queue", "keys", "activations", "reduce_bucket")
ALL_VARIANTS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
WITHIN = 0.10


def variants_of(config: RunConfig, names: tuple[str, ...]) -> list[RunConfig]:
    folder = Path("configs/deepspeed")
    return [
        config.model_copy(
            update={"engine": config.engine.model_copy(update={"deepspeed": folder / f"{name}.json"}), "name": name}
        )
        for name in names
    ]


def count_all(configs: list[RunConfig], fake_ranks: int | None = None) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # a forked process has not the other threads of its parent
    if fake_ranks is not None:
        start_fake(fake_ranks)
    start_deepspeed()
    return [count_step(config, counts_activations=fake_ranks is None or fake_ranks <= 64) for config in configs]


def on_one_of(ranks: int, configs: list[RunConfig]) -> list[dict[str, Any]]:
    """The same on rank 0 of `ranks` ranks, without the others."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(count_all, configs, ranks).result(timeout=600)


def planned(config: RunConfig, shape: TaskShape, text: TextEstimate, ranks: int, rank: int | None, chunks: Chunks) -> Any:
    """Planned bytes of a variant: held by category, with a micro-batch of these chunks; received by operation."""
    zero = ZeroSettings.load(config.engine.deepspeed)
    micro = typical_batch(text, config.ckd, ranks)
    assert tokens_in(micro[0]) == pytest.approx(tokens_in(chunks), rel=0.15)  # of a typical batch, and of the largest one seen
    memory = rank_memory(shape, zero, ranks, chunks, rank=rank)
    received: Counter[str] = Counter()
    for each in collectives_per_step(shape, zero, ranks, len(micro)):
        received[each.operation] += bytes_received([each], ranks, 1)["total"]
    held = {name: memory[name] for name in CATEGORIES}
    lasting = ["parameters", "optimizer", "queue", *(["gradients", "reduce_bucket"] if zero.stage == 3 else [])]
    return held | {"peak": memory["device"] - sum(held[name] for name in lasting)}, received


def differences(
    found: dict[str, Any], held: dict[str, float], received: Counter, categories: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    """(measured, planned) where they differ by more than WITHIN; norms and sums are a few numbers per step."""
    pairs = {name: (found[name], held[name]) for name in categories}
    pairs |= {kind: (found["received"].get(kind, 0), received[kind]) for kind in found["received"] | received}
    print({name: round(planned / measured - 1, 3) if measured else planned for name, (measured, planned) in pairs.items()})
    return {name: pair for name, pair in pairs.items() if abs(pair[1] - pair[0]) > WITHIN * pair[0] + 1024}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, minilm) -> RunConfig:
    """The quickstart's config on few texts with random vectors."""
    folder = tmp_path_factory.mktemp("quickstart")
    never = [
        "ckd.epochs=1e6",
        "ckd.global_batch=32",
        "ckd.micro_batch=16",
        *(f"ckd.{key}={NEVER}" for key in ("dev_every", "save_every", "log_every")),
    ]
    config = load_config(
        Path(__file__).parents[2] / "configs/quickstart.yaml", [f"runs_dir={folder}", "shards_from=shared", *never]
    )
    alike = [text for text in sentences(5000) if 55 <= len(text) <= 60]  # one chunk a micro-batch, in every step
    return with_shards(config, alike[: len(alike) // 100 * 100], 384)


def with_shards(config: RunConfig, texts: list[str], dim: int) -> RunConfig:
    """Writes shards of random vectors as the teacher's."""
    config.shards_dir.mkdir(parents=True)
    write_set(config.shards_dir, texts, dim, named_settings(config.teacher))
    return config


def tokens_in(chunks: Chunks) -> float:
    return sum(rows * width for rows, width in chunks)


def estimate(config: RunConfig, dim: int) -> tuple[TaskShape, TextEstimate]:
    student = architecture_of(str(config.teacher.model))
    is_bf16 = autocast_dtype(config.engine.precision, CPU) is not None
    shape = task_shape(config, "ckd", student, dim, is_bf16=is_bf16, on_cpu=True)
    return shape, estimate_text(config, load_devices().assumed, student.folder)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(4, marks=pytest.mark.soak)])
def test_quickstart_and_a_zero3_run_hold_and_receive_what_was_planned(world_size, quickstart):
    configs = variants_of(quickstart, ("zero1", "zero3"))
    shape, text = estimate(quickstart, 384)
    counted = on_ranks(world_size, count_all, configs)
    for config, ranks in zip(configs, zip(*counted, strict=True), strict=True):
        chunks = max(ranks, key=lambda rank: rank["activations"])["tokens"]
        held, received = planned(config, shape, text, world_size, None, chunks)
        most = {name: max(rank[name] for rank in ranks) for name in (*CATEGORIES, "peak")} | {"received": ranks[0]["received"]}
        assert not differences(most, held, received, CATEGORIES), config.name
        assert most["peak"] <= 1.02 * held["peak"] <= 1.35 * most["peak"], config.name  # gradients come as activations go


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [8, *(pytest.param(size, marks=pytest.mark.soak) for size in (64, 512, 4096))])
def test_one_of_many_ranks_holds_and_receives_what_was_planned(world_size, tiny_encoder, tmp_path):
    names = ALL_VARIANTS if world_size <= 64 else ("zero1", "zero3")
    total = max(256, world_size)
    ckd = {"global_batch": total, "micro_batch": max(1, total // world_size // 2), "queue": 2 * total, "epochs": 1e3}
    config = RunConfig.model_validate(
        {
            "name": "fake",
            "runs_dir": tmp_path,
            "shards_from": "shared",
            "text": {"sources": [{"type": "file", "path": "none.txt"}]},
            "teacher": {"model": str(tiny_encoder), "pooling": "mean"},
            "student": {"max_length": 32},
            "ckd": ckd | dict.fromkeys(("dev_every", "save_every", "log_every"), NEVER) | {"queue_placement": "sharded"},
            "engine": {"precision": "fp32"},
        }
    )
    config = with_shards(config, sentences(max(1000, total // 100 * 100 + 100)), 24)
    shape, text = estimate(config, 24)
    configs = variants_of(config, names)
    for each, found in zip(configs, on_one_of(world_size, configs), strict=True):
        held, received = planned(each, shape, text, world_size, 0, found["tokens"])
        categories = CATEGORIES if world_size <= 64 else tuple(name for name in CATEGORIES if name != "activations")
        assert not differences(found, held, received, categories), each.name
