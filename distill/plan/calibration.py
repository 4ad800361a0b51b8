"""Calibration: real steps of a stage and real batches of the teacher, for a minute on this machine, in place of assumed rates.

As many ranks as a node of the cluster has, each with its part of the global batch, train on the run's shards or, if there are
none, on made-up texts of the same lengths.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes
from torch.nn.functional import normalize

from distill.config import RunConfig
from distill.corpus import TextChunk, text_hash
from distill.plan.devices import DeviceTable, local_devices
from distill.plan.planner import Inputs, plan_stage
from distill.plan.shapes import stage_chain
from distill.run.collectives import barrier, from_rank_0
from distill.run.cores import num_cores
from distill.run.files import read_json, write_json
from distill.run.precision import autocast_dtype
from distill.shards import ShardReader, fingerprint, finish, write_shard
from distill.teacher.identity import named_settings

SECONDS = 60.0  # of measuring; the last third is for the teacher
TIME_LIMIT = 300.0  # seconds, with loading
WARM_UP_STEPS = 3  # in which kernels are chosen and ZeRO 3 records the order of parameters
MIN_STEPS = 4
NEVER = 10**9
ENDLESS = {"dev_every": NEVER, "save_every": NEVER, "max_steps": NEVER, "epochs": 1e6}
NUM_WORDS = 2000

Measurement = dict[str, Any]
Join = Callable[[float], torch.device]  # starts the process group from RANK etc. with this timeout; the rank's device
Measure = Callable[[RunConfig, torch.device], Measurement]


class _Enough(Exception):
    pass


def check_local(inputs: Inputs, table: DeviceTable) -> None:
    """Raises ValueError unless the ranks of one node can run on this machine."""
    cluster, (name, num_local) = inputs.cluster, local_devices()
    local = table.find(name)[0]
    if cluster.device_name != local:
        raise ValueError(
            f"--calibrate measures this machine, which has {local}, not {cluster.device_name}: leave --gpu or --calibrate out"
        )
    if cluster.ranks_per_node > num_local:
        raise ValueError(
            f"--calibrate runs a node's {cluster.ranks_per_node} ranks here, on {num_local}"
            f" {'cores' if local == 'cpu' else local}: --gpus-per-node {num_local} or fewer, or leave --calibrate out"
        )


def calibrate(inputs: Inputs, run: Callable[[RunConfig], list[Measurement]]) -> tuple[Inputs, Measurement]:
    """The inputs with measured rates, by which the planned time of the measured step is the measured one; and the measurement.

    run(config): the measurements of a node's ranks, see `run_ranks`. Raises ValueError where nothing can be measured.
    """
    name, cluster = calibrated_stage(inputs.config), replace(inputs.cluster, nodes=1)
    train = inputs.config.train(name)
    batch = max(-(-train.global_batch // inputs.cluster.nodes), cluster.ranks)
    config = inputs.config.model_copy(update={name: train.model_copy(update={"global_batch": batch})})
    text = replace(inputs.text, num_texts=max(inputs.text.num_texts, batch))
    local = replace(inputs, config=config, cluster=cluster, text=text)
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as folder:
        ranks = run(_make_run(local, name, Path(folder)))
    seconds = max(rank["seconds_per_step"] for rank in ranks)
    expected = plan_stage(local, name).chosen.seconds_per_step
    busy = max(seconds - expected["optimizer"] - expected["communication"], 0.1 * seconds)
    speedup = (expected["compute"] + expected["loss"]) / busy
    rates = {"student": cluster.device.student * speedup, "launch": cluster.device.launch / speedup}
    summary = f"{name}, {seconds:.3g} s per step of {batch} rows on {cluster.ranks} ranks ({ranks[0]['steps']} steps)"
    if all(rank["teacher"] for rank in ranks):
        flops_per_second = statistics.mean(rank["teacher"]["flops"] / rank["teacher"]["seconds"] for rank in ranks)
        rates["teacher"] = flops_per_second / cluster.peak_flops
        summary += f"; the teacher at {flops_per_second / 1e9:,.0f} GFLOP/s per rank"
    device = replace(cluster.device, **rates)
    measured = {"summary": summary, "stage": name, "seconds_per_step": seconds, "ranks": ranks} | rates
    return replace(inputs, cluster=replace(inputs.cluster, device=device)), measured


def calibrated_stage(config: RunConfig) -> str:
    """The first stage that trains the encoder of section student from its beginning. Raises ValueError if there is none."""
    for name in config.training_stages:
        if stage_chain(config, name) == [name] and not getattr(config.train(name), "freeze_encoder", False):
            return name
    raise ValueError(
        "nothing to calibrate: no stage trains the encoder of section student from its beginning: leave --calibrate out"
    )


def _make_run(inputs: Inputs, name: str, folder: Path) -> RunConfig:
    """A run in `folder` of stage `name` without end, on the run's own shards or on made-up ones."""
    config, train = inputs.config, inputs.config.train(name).model_copy(update=ENDLESS)
    place = {"runs_dir": folder, "name": "calibration", "shards_from": None, "stage": name}
    made = config.model_copy(update=place | {name: train})
    made.run_dir.mkdir()
    if (config.shards_dir / "manifest.json").is_file():
        made.shards_dir.symlink_to(config.shards_dir.resolve(), target_is_directory=True)
    else:
        sources = [source.model_copy(update={"weight": None}) for source in config.text.sources]
        made = made.model_copy(
            update={"text": config.text.model_copy(update={"sources": sources})}
        )  # made-up texts have no sources
        _write_shards(made, inputs, num_texts=max(2048, 2 * train.global_batch))
    return made


def _write_shards(config: RunConfig, inputs: Inputs, num_texts: int) -> None:
    """One shard of made-up texts as long as the run's, with random vectors."""
    from transformers import AutoTokenizer

    folder, draw = inputs.student.folder, np.random.default_rng(config.seed)
    if folder is None:
        raise ValueError("--calibrate trains here: the student's model must be a local folder (hf download NAME)")
    vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())[:NUM_WORDS]
    lengths = draw.choice(inputs.text.lengths, num_texts)
    texts = [" ".join(draw.choice(words, max(int(length) - 2, 1))) for length in lengths]
    hashes = np.array([text_hash(text) for text in texts], dtype=np.int64)
    vectors = normalize(torch.from_numpy(draw.standard_normal((num_texts, inputs.teacher_dim)))).numpy()
    teacher, rows = named_settings(config.teacher), config.shards.block_rows
    made_by: Any = {"teacher_fingerprint": fingerprint(teacher), "text_fingerprint": "made up"}
    config.shards_dir.mkdir()
    write_shard(config.shards_dir, 0, texts, hashes, vectors.astype(np.float16), block_rows=rows, **made_by)
    finish(config.shards_dir, teacher=teacher, text_fingerprints=["made up"], rows=num_texts, block_rows=rows, **made_by)


def measure_rank(config: RunConfig, device: torch.device) -> Measurement:
    """{seconds_per_step: median, steps, teacher: {flops, seconds} or None} of this rank; called by all ranks."""
    times: list[float] = []

    def record_step(step: int) -> bool:
        times.append(time.perf_counter())
        elapsed = times[-1] - times[0]
        is_enough = elapsed > SECONDS * (2 / 3 if len(times) > WARM_UP_STEPS + MIN_STEPS else 1)
        if from_rank_0(is_enough, device):
            raise _Enough
        return False

    with suppress(_Enough):
        config.stage_of(config.stage).run(device, record_step)
    steps = np.diff(times)[min(WARM_UP_STEPS, len(times) - 2) :]
    teacher = _measure_teacher(config, device)
    barrier()  # the others still need this rank
    return {"seconds_per_step": float(np.median(steps)), "steps": len(steps), "teacher": teacher}


def _measure_teacher(config: RunConfig, device: torch.device) -> dict[str, float] | None:
    """FLOPs of real tokens, and seconds; None where vectors are given, or the teacher is spread over ranks or not local."""
    from distill.teacher.encoder import Teacher

    section = config.teacher
    names = [str(each.model) for each in section.models]
    is_local = all(name.startswith("package:") or Path(name).exists() for name in names)
    if section.model is None or not is_local or section.placement != "device":
        return None
    teacher = Teacher(section, device, autocast_dtype(section.precision, device))
    reader = ShardReader(config.shards_dir, verify=False)
    rows, first, start, flops = max(64, section.tokens_per_batch // 4), 0, 0.0, 0.0
    while not first or time.perf_counter() - start < SECONDS / 3:
        teacher.encode(teacher.read(TextChunk(reader.texts((np.arange(rows) + first) % len(reader)), None, None)))
        if not first:  # in which kernels are chosen
            start, flops = time.perf_counter(), float(teacher.work.flops)
        first += rows
    return {"flops": teacher.work.flops - flops, "seconds": time.perf_counter() - start}


def run_ranks(
    config: RunConfig, environments: Sequence[dict[str, str]], join: Join, measure: Measure = measure_rank
) -> list[Measurement]:
    """The measurements of ranks, processes on this machine that find each other by these environments (RANK etc.).

    Raises ValueError with the reason of the first rank that failed, or if they take longer than TIME_LIMIT.
    """
    folder, deadline = config.run_dir, time.monotonic() + TIME_LIMIT
    ranks = start_processes(_run_rank, (config, environments, join, measure), len(environments), join=False)
    try:
        while not ranks.join(max(deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= deadline:
                log = (folder / "rank-0.log").read_text(encoding="utf-8", errors="replace").strip()
                raise ValueError(
                    f"calibration took more than {TIME_LIMIT:g} s and was ended: try a smaller global_batch, or plan without"
                    f" --calibrate; rank 0 printed last: {log.splitlines()[-1] if log else 'nothing'}"
                )
    except (ProcessRaisedException, ProcessExitedException) as error:
        # one that raised an error of the user's came first: the others then lost the connection to it
        reasons = {int(path.stem): path.read_text(encoding="utf-8") for path in folder.glob("*.error")}
        rank = min(reasons, default=error.error_index)
        reason = reasons.get(rank) or str(error).strip().splitlines()[-1]
        raise ValueError(f"calibration failed on rank {rank}: {reason}") from None
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    return [read_json(folder / f"rank-{rank}.json") or {} for rank in range(len(environments))]


def _run_rank(rank: int, config: RunConfig, environments: Sequence[dict[str, str]], join: Join, measure: Measure) -> None:
    folder = config.run_dir
    with (folder / f"rank-{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= environments[rank]
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // len(environments)))
    try:
        write_json(folder / f"rank-{rank}.json", measure(config, join(config.engine.timeout)))
    except (ValueError, OSError, FloatingPointError) as error:
        if not isinstance(error, TimeoutError):
            (folder / f"{rank}.error").write_text(str(error), encoding="utf-8")
        raise
