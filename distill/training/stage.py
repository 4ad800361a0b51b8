"""Assembles one training stage from the config and runs it; every rank calls `run_stage`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary

from distill.config import ContrastConfig, RunConfig, TrainConfig
from distill.corpus import held_out_sources
from distill.evaluation.sts import read_dev
from distill.files import sha256_of
from distill.precision import autocast_dtype
from distill.sampling import CHUNK_ROWS, CHUNK_ROWS_ON_GPU, GlobalOrder
from distill.sessions import session
from distill.shards import ShardReader
from distill.stages import Stage, plain, read_json, stage_of
from distill.student import Student
from distill.student.encoder import build_encoder, set_dropout
from distill.student.student import load_projection
from distill.teacher.dev import TEACHER_DEV
from distill.teacher.identity import check_teacher
from distill.training.batches import ShardBatches
from distill.training.checkpoint import Checkpoints
from distill.training.ckd import CkdRecipe, CkdTask
from distill.training.contrast import VIEW_ROWS, ContrastRecipe, ContrastTask
from distill.training.dashboard import layout, settings
from distill.training.dev import Dev, split_held_out
from distill.training.distributed import barrier, rank, world_size
from distill.training.encoded import ENCODED, Encoded, encode_all
from distill.training.engine import build_engine
from distill.training.hpd import HpdRecipe, HpdTask, LinearMap, fit_head, whitening_of
from distill.training.instruments import Instruments
from distill.training.loop import Trainer
from distill.training.origin import texts
from distill.training.projection import build_projection, fit_projection, fit_sample
from distill.training.projector import write_projector
from distill.training.recipe import Recipe
from distill.training.rows import Sentences, load_triplets


def run_stage(
    config: RunConfig, name: str, device: torch.device, asked_to_stop: Callable[[int], bool] = lambda step: False
) -> dict[str, Any]:
    """Trains stage `name` of a run to its end, or continues it; returns its results.

    The student lies in <run>/<name>/student afterwards and DONE.json says so. Raises ValueError for what a user can mend.
    asked_to_stop: called in each step with its number, from 1; True, on any rank, ends all ranks after that step and its
    checkpoint with `Stopped`, and the same call goes on from there.
    """
    stage = stage_of(config, name)
    check_inputs(config, stage)
    if rank() == 0:
        stage.begin()
    barrier()
    train: TrainConfig = getattr(config, name)
    amp = autocast_dtype(config.engine.precision, device)
    recipe = build_recipe(config, name, stage.directory, device, amp)
    recipe.task.to(device)
    instruments = Instruments(recipe.task, device)
    temperature = getattr(train, "temperature", None)
    engine = build_engine(
        recipe.task,
        train,
        config.engine,
        num_micro=recipe.num_micro,
        temperature_lr=(temperature.lr if temperature else None) or train.lr,
    )
    record = config.run_dir / "tensorboard" / name
    trainer = Trainer(
        name,
        recipe,
        engine,
        train,
        build_dev(config, amp),
        instruments,
        student_dir=stage.directory / "student",
        checkpoints=Checkpoints(
            stage.directory / "checkpoints",
            keep=train.keep,
            device=device,
            made_of=stage.config | {"inputs": stage.inputs, "steps_per_epoch": recipe.steps_per_epoch},
        ),
        max_skipped=config.engine.max_skipped,
        asked_to_stop=asked_to_stop,
        tensorboard=record,
        device=device,
    )
    if trainer.metrics.is_new:
        trainer.metrics.describe(texts(config, device), [layout(), compared_by(config, name)])
    with session(stage.directory, "train", device):
        results = trainer.run()
    if rank() == 0:
        shutil.rmtree(stage.directory / ENCODED, ignore_errors=True)
        student = stage.directory / "student"
        held_out = config.shards_dir / "held_out"
        if (held_out / "manifest.json").exists():
            kept = Student.load(student).to(device).eval()
            write_projector(record, kept, ShardReader(held_out), held_out_sources(config.precompute_dir / "text"))
        digests = [sha256_of(path) for path in sorted(student.glob("*.safetensors"))]
        stage.finish(results, "-".join(digest[:32] for digest in digests))
    barrier()
    return results


def compared_by(config: RunConfig, name: str) -> Summary:
    """A line of TensorBoard's hparams table: the settings of a stage and of those that it goes on from, under their names in
    the config, so that of a sweep the columns that differ are those that were swept."""
    row: dict[str, Any] = {"stage": name, "ranks": world_size(), "teacher": config.teacher.model}
    while name != "student":
        row[name] = getattr(config, name)
        name = "student" if name == "ckd" else getattr(config, name).init
    return settings(plain(row | {"seed": config.seed, "student": config.student}), f"{config.name}/{row['stage']}")


def check_inputs(config: RunConfig, stage: Stage) -> None:
    """What the stage reads is there and fits; found before anything heavy. Raises ValueError naming what to run first."""
    shards = ShardReader(config.shards_dir, verify=False)
    check_teacher(config, shards.manifest)
    for name, fingerprint in stage.inputs.items():
        if not fingerprint:
            raise ValueError(f"{stage.name} needs {config.run_dir / name}, which is not finished: run that stage first")
    if stage.name == "ckd" and config.ckd.projection_width not in (None, shards.dim):
        raise ValueError(
            f"ckd.projection_width {config.ckd.projection_width} is not the teacher's width {shards.dim}: leave it out"
        )


def build_recipe(config: RunConfig, name: str, directory: Path, device: torch.device, amp: torch.dtype | None) -> Recipe:
    """The module and data of a stage on this rank."""
    reader = ShardReader(config.shards_dir)
    train: TrainConfig = getattr(config, name)
    torch.manual_seed(config.seed)  # new weights, such as the projection's
    student = build_student(config, name)
    student.train()  # transformers loads encoders in eval mode: without dropout, and without activation checkpointing
    set_dropout(student.encoder, 0.0)
    student.encoder.get_input_embeddings().requires_grad_(not config.student.freeze_embeddings)
    if config.engine.activation_checkpointing:
        student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    student.to(device)
    if device.type == "cpu":
        student.encoder.set_attn_implementation("eager")  # a third faster than the fused one in bf16 there
    if name == "ckd":
        projection = build_projection(student.width, reader.dim, config.ckd)
        if projection is not None:
            fit_projection(projection, student, reader, config.ckd, config.seed)
        task = CkdTask(student, projection, config.ckd, amp, seed=config.seed)
        return CkdRecipe(task, shard_batches(reader, student, train, config.seed, device), device)
    if name == "hpd":
        if config.hpd.dim > min(reader.dim, len(reader) - 1):
            raise ValueError(f"hpd.dim {config.hpd.dim} is above what the teacher's {len(reader)} x {reader.dim} vectors have")
        encoded = None
        if config.hpd.freeze_encoder:
            with session(directory, "encode", device):
                encoded = encode_all(student, reader, directory / ENCODED, amp)
        student.add_head(config.hpd.dim, config.hpd.head, config.seed)
        components = torch.from_numpy(reader.moments.pca(config.hpd.dim)[0]).float()
        sentences, vectors = fit_sample(reader, config.seed)
        known = compact_way(config, student, reader, components.double().numpy())
        fit_head(student, sentences, vectors @ components.numpy().T, known=known)
        hpd_task = HpdTask(student, components, config.hpd, amp, whitening=whitening_of(config.hpd, reader), seed=config.seed)
        return HpdRecipe(hpd_task, shard_batches(reader, student, train, config.seed, device, encoded), device)
    assert isinstance(train, ContrastConfig)
    if train.dropout is None or train.dropout > 0:
        set_dropout(student.encoder, own_dropout(student) if train.dropout is None else train.dropout)
    rows = load_triplets(config, reader, directory) if name == "finetune" else Sentences(reader)
    space = teacher_space(config, train.init, student, reader) if train.teacher_weight else {}  # type: ignore[attr-defined]
    contrast_task = ContrastTask(student, train, amp, num_views=rows.num_views, **space)
    replay = reader if train.teacher_weight else None
    view_rows = VIEW_ROWS if device.type == "cpu" else CHUNK_ROWS_ON_GPU
    return ContrastRecipe(contrast_task, rows, replay, seed=config.seed, view_rows=view_rows)


def build_student(config: RunConfig, name: str) -> Student:
    """The student with which a stage begins: that of the stage before it, or the encoder that the config describes."""
    init = "student" if name == "ckd" else getattr(config, name).init
    if init != "student":
        return Student.load(config.run_dir / init / "student")
    encoder, tokenizer = build_encoder(config.student, config.teacher.model, config.seed)
    return Student(encoder, tokenizer, pooling=config.student.pooling, max_length=config.student.max_length)


def shard_batches(
    reader: ShardReader, student: Student, train: TrainConfig, seed: int, device: torch.device, encoded: Encoded | None = None
) -> ShardBatches:
    order = GlobalOrder(reader.shard_rows, global_batch=train.global_batch, seed=seed)
    part: dict[str, Any] = {"micro_batch": train.micro_batch, "rank": rank(), "world_size": world_size()}
    part["chunk_rows"] = CHUNK_ROWS if device.type == "cpu" else CHUNK_ROWS_ON_GPU
    return ShardBatches(reader, order, student, **part, encoded=encoded)


def own_dropout(student: Student) -> float:
    """The dropout that the encoder's own config names."""
    config = student.encoder.config
    named = [getattr(config, name, None) for name in ("hidden_dropout_prob", "dropout_rate", "dropout")]
    return next((float(value) for value in named if value is not None), 0.1)


def teacher_space(config: RunConfig, init: str, student: Student, reader: ShardReader) -> dict[str, Any]:
    """How a student and its teacher compare: by the projection that CKD trained, in a compact student's own space, or as is.

    Raises ValueError where there is no way between them.
    """
    if student.head is not None:
        return {"components": torch.from_numpy(reader.moments.pca(student.dim)[0]).float()}
    projection = load_projection(config.run_dir / init / "student")
    if projection is not None:
        return {"projection": projection}
    if student.dim != reader.dim:
        raise ValueError(
            f"teacher_weight: the student is {student.dim} wide, the teacher {reader.dim}, and no projection between them was"
            " trained: begin with the student of ckd (init: ckd), or leave teacher_weight at 0"
        )
    return {}


def compact_way(config: RunConfig, student: Student, reader: ShardReader, components: np.ndarray) -> LinearMap | None:
    """(weight [dim, d_s], bias [dim]) of C P, the components [dim, d] after CKD's projection, or of C where CKD needed none.

    None if the student has no way to the teacher's space that was learned: there was no CKD, or what followed dropped it.
    """
    init = config.hpd.init
    projection = None if init == "student" else load_projection(config.run_dir / init / "student")
    if projection is not None:
        weight, bias = (parameter.detach().double().numpy() for parameter in (projection.weight, projection.bias))
        return components @ weight, components @ bias
    while init not in ("ckd", "student"):
        init = getattr(config, init).init
    as_is = init == "ckd" and build_projection(student.width, reader.dim, config.ckd) is None
    return (components, np.zeros(len(components))) if as_is else None


def build_dev(config: RunConfig, amp: torch.dtype | None) -> Dev | None:
    """The dev evaluation over the held-out shards; None if nothing was held out."""
    path = config.shards_dir / "held_out"
    if not (path / "manifest.json").exists():
        return None
    held_out = ShardReader(path)
    _, rows = split_held_out(len(held_out), config.evaluate.num_held_out, config.evaluate.dev_sentences)
    if len(rows) < 3:
        return None
    sts = None if config.evaluate.sts is None else read_dev(config.evaluate.sts)
    teacher = read_json(config.precompute_dir / TEACHER_DEV) or {}
    known = teacher.get("STSB-dev") if teacher.get("sts") == config.evaluate.sts else None
    return Dev(held_out, rows, sts, batch_size=config.evaluate.batch_size, amp=amp, teacher_sts=known)
