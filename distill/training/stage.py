"""Assembles one training stage from the config and runs it; every rank calls `run_stage`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.config import RunConfig, TrainConfig
from distill.corpus import read_dataset, read_rows
from distill.evaluation.sts import read_dev
from distill.files import sha256_of
from distill.precision import autocast_dtype
from distill.sampling import GlobalOrder
from distill.shards import ShardReader
from distill.stages import Stage, stage_of
from distill.student import Student
from distill.student.encoder import build_encoder, set_dropout
from distill.student.student import load_extra
from distill.teacher.identity import check_teacher
from distill.training.batches import ShardBatches
from distill.training.checkpoint import Checkpoints
from distill.training.ckd import CkdRecipe, CkdTask
from distill.training.dev import Dev, split_held_out
from distill.training.distributed import barrier, rank, world_size
from distill.training.engine import build_engine
from distill.training.finetune import FinetuneRecipe, FinetuneTask, Triplets
from distill.training.hpd import HpdRecipe, HpdTask, fit_head
from distill.training.loop import Trainer
from distill.training.mining import mine_triplets
from distill.training.projection import build_projection, fit_projection, fit_sample
from distill.training.recipe import Recipe


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
    temperature = getattr(train, "temperature", None)
    engine = build_engine(
        recipe.task,
        train,
        config.engine,
        num_micro=recipe.num_micro,
        temperature_lr=(temperature.lr if temperature else None) or train.lr,
    )
    trainer = Trainer(
        name,
        recipe,
        engine,
        train,
        build_dev(config, amp),
        student_dir=stage.directory / "student",
        checkpoints=Checkpoints(
            stage.directory / "checkpoints",
            keep=train.keep,
            device=device,
            made_of=stage.config | {"inputs": stage.inputs, "steps_per_epoch": recipe.steps_per_epoch},
        ),
        max_skipped=config.engine.max_skipped,
        asked_to_stop=asked_to_stop,
        tensorboard=config.run_dir / "tensorboard" / name,
        device=device,
    )
    results = trainer.run()
    if rank() == 0:
        student = stage.directory / "student"
        digests = [sha256_of(path) for path in sorted(student.glob("*.safetensors"))]
        stage.finish(results, "-".join(digest[:32] for digest in digests))
    barrier()
    return results


def check_inputs(config: RunConfig, stage: Stage) -> None:
    """What the stage reads is there and fits; found before anything heavy. Raises ValueError naming what to run first."""
    shards = ShardReader(config.run_dir / "shards", verify=False)
    check_teacher(config, shards.manifest)
    for name, fingerprint in stage.inputs.items():
        if not fingerprint:
            raise ValueError(f"{stage.name} needs {config.run_dir / name}, which is not finished: run that stage first")
    if stage.name == "ckd" and config.ckd.projection_width not in (None, shards.dim):
        raise ValueError(
            f"ckd.projection_width {config.ckd.projection_width} is not the teacher's width {shards.dim}: leave it out"
        )
    if stage.name == "finetune" and -(-config.finetune.global_batch // world_size()) > config.finetune.micro_batch:
        raise ValueError(
            f"finetune.global_batch {config.finetune.global_batch} over {world_size()} ranks does not fit one micro-batch of"
            f" {config.finetune.micro_batch}: every anchor is held against all candidates at once; raise finetune.micro_batch"
        )


def build_recipe(config: RunConfig, name: str, directory: Path, device: torch.device, amp: torch.dtype | None) -> Recipe:
    """The module and data of a stage on this rank."""
    reader = ShardReader(config.run_dir / "shards")
    train: TrainConfig = getattr(config, name)
    torch.manual_seed(config.seed)  # new weights, such as the projection's
    if name == "ckd":
        encoder, tokenizer = build_encoder(config.student, config.teacher.model, config.seed)
        student = Student(encoder, tokenizer, pooling=config.student.pooling, max_length=config.student.max_length)
    else:
        student = Student.load(config.run_dir / getattr(config, name).init / "student")
    set_dropout(student.encoder, 0.0)
    student.encoder.get_input_embeddings().requires_grad_(not config.student.freeze_embeddings)
    if config.engine.activation_checkpointing:
        student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cpu":
        student.encoder.set_attn_implementation("eager")  # a third faster than the fused one in bf16 there

    def shard_batches() -> ShardBatches:
        order = GlobalOrder(reader.shard_rows, global_batch=train.global_batch, seed=config.seed)
        return ShardBatches(reader, order, student, micro_batch=train.micro_batch, rank=rank(), world_size=world_size())

    if name == "ckd":
        projection = build_projection(student.width, reader.dim, config.ckd)
        if projection is not None:
            fit_projection(projection, student, reader, config.ckd, config.seed)
        return CkdRecipe(CkdTask(student, projection, config.ckd, amp, seed=config.seed), shard_batches(), device)
    if name == "hpd":
        if config.hpd.dim > min(reader.dim, len(reader) - 1):
            raise ValueError(f"hpd.dim {config.hpd.dim} is above what the teacher's {len(reader)} x {reader.dim} vectors have")
        student.add_head(config.hpd.dim, config.hpd.head, config.seed)
        components = torch.from_numpy(reader.moments.pca(config.hpd.dim)[0]).float()
        sentences, vectors = fit_sample(reader, config.seed)
        fit_head(student, sentences, vectors @ components.numpy().T)
        return HpdRecipe(HpdTask(student, components, amp, freeze_encoder=config.hpd.freeze_encoder), shard_batches())
    if config.finetune.dropout is None or config.finetune.dropout > 0:
        set_dropout(student.encoder, own_dropout(student) if config.finetune.dropout is None else config.finetune.dropout)
    triplets = load_triplets(config, reader, directory)
    if config.finetune.teacher_weight and triplets.vectors.shape[1] == 0:
        raise ValueError("finetune.teacher_weight needs the teacher's vectors of the anchors: only mined triplets have them")
    projection = teacher_projection(config, student, reader.dim) if config.finetune.teacher_weight else None
    task = FinetuneTask(student, projection, config.finetune, amp)
    return FinetuneRecipe(task, triplets, student.tokenize, seed=config.seed, rank=rank(), world_size=world_size())


def own_dropout(student: Student) -> float:
    """The dropout that the encoder's own config names."""
    config = student.encoder.config
    named = [getattr(config, name, None) for name in ("hidden_dropout_prob", "dropout_rate", "dropout")]
    return next((float(value) for value in named if value is not None), 0.1)


def teacher_projection(config: RunConfig, student: Student, teacher_dim: int) -> torch.nn.Linear | None:
    """The projection that CKD trained, so that fine-tuning is held to the teacher in the same space."""
    projection = build_projection(student.dim, teacher_dim, config.ckd)
    if projection is not None:
        kept = load_extra(config.run_dir / config.finetune.init / "student")
        projection.load_state_dict({"weight": kept["projection.weight"], "bias": kept["projection.bias"]})
    return projection


def load_triplets(config: RunConfig, reader: ShardReader, directory: Path) -> Triplets:
    """Triplets from the file or dataset that the config names, else mined from the shards (once, by rank 0)."""
    finetune = config.finetune
    if finetune.triplets or finetune.dataset:
        if finetune.triplets:
            given = read_rows(finetune.triplets, finetune.fields)
        else:
            given = read_dataset(finetune.dataset or "", finetune.fields, finetune.split)
        sentences = [(anchor, positive, negative) for anchor, positive, negative in given]
        return Triplets(sentences, np.zeros((len(sentences), 0), dtype=np.float16))
    path = directory / "triplets.npy"
    if rank() == 0 and not path.exists():
        mine_triplets(reader, finetune, config.seed, path)
    barrier()
    rows = np.load(path, allow_pickle=False)
    columns = [reader.texts(rows[:, column]) for column in range(3)]
    return Triplets(list(zip(*columns, strict=True)), reader.vectors(rows[:, 0]))


def build_dev(config: RunConfig, amp: torch.dtype | None) -> Dev | None:
    """The dev evaluation over the held-out shards; None if nothing was held out."""
    path = config.run_dir / "shards" / "held_out"
    if not (path / "manifest.json").exists():
        return None
    held_out = ShardReader(path)
    _, rows = split_held_out(len(held_out), config.evaluate.num_held_out, config.evaluate.dev_sentences)
    if len(rows) < 3:
        return None
    sts = None if config.evaluate.sts is None else read_dev(config.evaluate.sts)
    return Dev(held_out, rows, sts, batch_size=config.evaluate.batch_size, amp=amp)
