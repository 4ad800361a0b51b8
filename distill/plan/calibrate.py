"""A minute of the real stage on this machine, so that its rates are measured: the ranks that a node will have, each with its
share of the global batch, on the run's own shards or on made-up sentences of the corpus's lengths.

    calibrated    a plan with the measured rates instead of the assumed ones
    run_rank      what a rank does: real steps (training.stage.run_stage), then batches of the real teacher; nothing is kept
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.config import RunConfig, TrainConfig
from distill.corpus import text_hash
from distill.plan.corpus import Corpus
from distill.plan.plan import Models, Plan, StagePlan, make_plan, read_zero
from distill.plan.time import Cluster
from distill.precision import autocast_dtype
from distill.shards import fingerprint, finish, write_shard
from distill.teacher.identity import named_settings

SECONDS = 60.0  # for all of it; the teacher has the last third
FIRST_STEPS = 3  # in which kernels are chosen and ZeRO-3 finds its way
LEAST_STEPS = 4
NEVER = 10**9
WORDS = 2000

Measure = Callable[[RunConfig, int], list[dict[str, Any]]]


class _Enough(Exception):
    pass


def calibrated(plan: Plan, report: Callable[[str], object], measure: Measure) -> Plan:
    """measure(config, ranks): runs `run_rank` on so many ranks of this machine; returns what each of them did.

    Raises ValueError where the run has no stage that trains the encoder itself from its beginning, or its models are not on
    this machine.
    """
    stage = _first(plan)
    train: TrainConfig = getattr(plan.config, stage.name)
    ranks = plan.cluster.ranks_a_node
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as folder:
        config = calibration_run(plan.config, stage.name, -(-train.global_batch // plan.cluster.nodes), plan, Path(folder))
        report(f"{stage.name} on {ranks} ranks for up to {SECONDS:.0f} s")
        found = measure(config, ranks)
    return with_rates(plan, stage, found)


def check_device(cluster: Cluster, here: str, num_here: int) -> None:
    """Raises ValueError unless a node's ranks can run here. here: this machine's device in the table, num_here: of them."""
    if cluster.name != here:
        raise ValueError(
            f"--calibrate measures this machine, which has {here}, not {cluster.name}: leave --gpu or --calibrate out"
        )
    if cluster.ranks_a_node > num_here:
        what = "cores" if here == "cpu" else here
        raise ValueError(
            f"--calibrate runs a node's {cluster.ranks_a_node} ranks here, on {num_here} {what}: --gpus-per-node {num_here} or"
            " fewer, or leave --calibrate out"
        )


def _first(plan: Plan) -> StagePlan:
    for stage in plan.stages:
        begins_with_it = stage.name == "ckd" or getattr(plan.config, stage.name).init == "student"
        if begins_with_it and stage.step.compute > 0:  # none, where it is frozen
            return stage
    raise ValueError(
        "nothing to calibrate: no stage trains the encoder of section student from its beginning: leave --calibrate out"
    )


def calibration_run(config: RunConfig, name: str, global_batch: int, plan: Plan, folder: Path) -> RunConfig:
    """A run in `folder` with shards of its own, or those that this config's run has already."""
    changes: dict[str, Any] = {"dev_every": NEVER, "save_every": NEVER, "max_steps": NEVER, "epochs": 1e6}
    train = getattr(config, name).model_copy(update=changes | {"global_batch": max(global_batch, plan.cluster.ranks_a_node)})
    made = config.model_copy(
        update={"runs_dir": folder, "name": "calibration", "shards_from": None, "stage": name, name: train}
    )
    made.run_dir.mkdir(parents=True)
    if (config.shards_dir / "manifest.json").is_file():
        made.shards_dir.symlink_to(config.shards_dir.resolve(), target_is_directory=True)
    else:
        write_made_up(made, plan.corpus, plan.models, count=max(2048, 2 * train.global_batch))
    return made


def write_made_up(config: RunConfig, corpus: Corpus, models: Models, count: int) -> None:
    """A shard set of sentences as long as the corpus's, with vectors of no meaning."""
    if models.student.folder is None:
        raise ValueError(
            f"--calibrate trains here: {models.student.name} must be a local folder (hf download {models.student.name})"
        )
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(models.student.folder, trust_remote_code=False).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())[:WORDS]
    draw = np.random.default_rng(config.seed)
    lengths = draw.choice(corpus.lengths, count)
    texts = [" ".join(draw.choice(words, max(int(length) - 2, 1))) for length in lengths]
    vectors = draw.standard_normal((count, models.dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config.shards_dir.mkdir(parents=True)
    teacher = named_settings(config.teacher)
    hashes = np.array([text_hash(text) for text in texts], dtype=np.int64)
    write_shard(
        config.shards_dir,
        0,
        texts,
        hashes,
        vectors.astype(np.float16),
        block_rows=config.shards.block_rows,
        teacher_fingerprint=fingerprint(teacher),
        text_fingerprint="made up",
    )
    finish(
        config.shards_dir,
        teacher=teacher,
        teacher_fingerprint=fingerprint(teacher),
        text_fingerprint="made up",
        text_fingerprints=["made up"],
        rows=count,
        block_rows=config.shards.block_rows,
    )


def run_rank(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """{seconds_a_step, steps, teacher: {operations, seconds}}: medians and sums of what this rank did. All ranks call it."""
    from distill.training.distributed import from_rank_0
    from distill.training.stage import run_stage

    times: list[float] = []

    def stamp(step: int) -> bool:
        times.append(time.perf_counter())
        spent = times[-1] - times[0]
        enough = (len(times) > FIRST_STEPS + LEAST_STEPS and spent > SECONDS * 2 / 3) or spent > SECONDS
        if from_rank_0(enough, device):
            raise _Enough
        return False

    with suppress(_Enough):
        run_stage(config, config.stage, device, stamp)
    steps = np.diff(times)[min(FIRST_STEPS, len(times) - 2) :]
    teacher = _run_teacher(config, device) if config.teacher.model else None
    return {"seconds_a_step": float(statistics.median(steps)), "steps": len(steps), "teacher": teacher}


def _run_teacher(config: RunConfig, device: torch.device) -> dict[str, float] | None:
    """Operations on real tokens, and seconds; None where a teacher is spread over ranks or not on this machine."""
    from distill.shards import ShardReader
    from distill.teacher.encoder import Teacher

    local = all(Path(str(each.model)).exists() or str(each.model).startswith("package:") for each in config.teacher.models)
    if not local or config.teacher.placement != "device":
        return None
    teacher = Teacher(config.teacher, device, autocast_dtype(config.teacher.precision, device))
    reader = ShardReader(config.shards_dir, verify=False)
    rows = max(64, 8 * config.teacher.tokens_per_batch // 32)
    began = None
    for start in range(0, len(reader) * 100, rows):
        teacher.encode(teacher.read(reader.texts((np.arange(rows) + start) % len(reader))))
        if began is None:  # the first chooses kernels
            began, before = time.perf_counter(), replace(teacher.work)
        elif time.perf_counter() - began > SECONDS / 3:
            break
    work = teacher.work
    assert began is not None
    return {"operations": float(work.flops - before.flops), "seconds": time.perf_counter() - began}


def with_rates(plan: Plan, stage: StagePlan, found: list[dict[str, Any]]) -> Plan:
    """The plan, with utilisations such that the measured step is the planned one on the ranks that were measured."""
    cluster, config = plan.cluster, plan.config
    train: TrainConfig = getattr(config, stage.name)
    here = replace(cluster, nodes=1)
    share = max(-(-train.global_batch // cluster.nodes), here.ranks)
    small = config.model_copy(update={stage.name: train.model_copy(update={"global_batch": share}), "stages": [stage.name]})
    corpus = replace(plan.corpus, sentences=max(plan.corpus.sentences, share))
    expected = make_plan(small, here, corpus, plan.models).stages[0].step
    seconds = max(each["seconds_a_step"] for each in found)
    busy = max(seconds - expected.optimizer - expected.collectives, 0.1 * seconds)
    faster = (expected.compute + expected.loss) / busy
    rates = {"student": cluster.device.student * faster, "launch": cluster.device.launch / faster}
    said = f"{seconds:.3g} s a step of {share} on {here.ranks} ranks ({found[0]['steps']} steps)"
    encoded = [each["teacher"] for each in found if each["teacher"]]
    if encoded:
        rate = statistics.mean(each["operations"] / each["seconds"] for each in encoded)
        rates["teacher"] = rate / cluster.device.peak(cluster.is_bf16)
        said += f"; the teacher at {rate / 1e9:,.0f} GFLOP/s a rank"
    measured = replace(cluster, device=cluster.device.model_copy(update=rates))
    made = make_plan(config, measured, plan.corpus, plan.models)
    zero = read_zero(config.engine.deepspeed).get("stage", 0)
    return replace(made, measured={"said": said, "seconds_a_step": seconds, "ranks": found, "zero": zero} | rates)
