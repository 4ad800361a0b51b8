"""A training stage: assembles a task from the config, and runs it on all ranks to its end or from its last checkpoint."""

from __future__ import annotations

import logging
import shutil
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from distill.corpus import held_out_sources
from distill.corpus.evaluation_sets import read_sts_dev
from distill.metrics.held_out import dev_rows
from distill.run.collectives import any_rank, barrier, rank, world_size
from distill.run.config import Effect, Section
from distill.run.files import sha256_of
from distill.run.model_folders import model_fingerprint, resolve_model
from distill.run.precision import autocast_dtype, describe_precision
from distill.run.sampling import CHUNK_ROWS, CHUNK_ROWS_ON_GPU, GlobalOrder
from distill.run.session_log import session
from distill.run.stage import Stage, StopRequested, checkpoint_steps, stage_fingerprint
from distill.run.stopping import CheckStop, Stopped, never
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import build_encoder, set_dropout
from distill.student.fingerprint import check_student, student_fingerprint
from distill.student.student_config import StudentConfig
from distill.teacher.dev_score import read_dev_score
from distill.teacher.identity import check_teacher, check_weights
from distill.teacher.teacher_config import TeacherConfig
from distill.training.batches import ShardBatches, report_dropped
from distill.training.checkpoint import Checkpoints
from distill.training.dashboard import describe_run
from distill.training.dev_evaluation import DevEvaluation
from distill.training.encoded_cache import Encoded
from distill.training.engine import build_engine
from distill.training.loop import Trainer
from distill.training.projector import write_projector
from distill.training.step_metrics import StepMetrics
from distill.training.task import Task
from distill.training.train_config import EngineConfig, TrainConfig

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Setup:
    """What a task is built from, on this rank."""

    reader: ShardReader
    student: Student
    device: torch.device
    amp: torch.dtype | None
    seed: int
    check_stop: CheckStop = never

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS if self.device.type == "cpu" else CHUNK_ROWS_ON_GPU

    def shard_batches(self, train: TrainConfig, encoded: Encoded | None = None) -> ShardBatches:
        """The steps over the shards. encoded: a frozen encoder's vectors, instead of tokens."""
        order = GlobalOrder(self.reader.shard_rows, global_batch=train.global_batch, seed=self.seed)
        report_dropped(order)
        part: dict[str, Any] = {"micro_batch": train.micro_batch, "rank": rank(), "world_size": world_size()}
        return ShardBatches(self.reader, order, self.student, **part, chunk_rows=self.chunk_rows, encoded=encoded)


class TrainingStage(Stage):
    """A training stage. A subclass names its config section and title and builds its task.

    title: what the method is called in model cards and reports. selects_by_sts: whether the best student is chosen by STS-B's
    dev set, where it is there, instead of by fidelity to the teacher.
    """

    config_class: ClassVar[type[TrainConfig]]
    title: ClassVar[str]
    selects_by_sts: ClassVar[bool] = False
    uses_seed = True
    reads = (
        "student",
        "engine.precision",
        "evaluate.dev_sentences",
        "evaluate.num_held_out",
        "evaluate.sts",
    )
    effects: ClassVar[dict[str, Effect]] = {
        "evaluate.dev_sentences": "selection",
        "evaluate.num_held_out": "selection",
        "evaluate.sts": "selection",
    }
    covered_by_inputs = ("teacher", "engine", "evaluate.batch_size")  # the shards are the teacher's

    @property
    def train(self) -> TrainConfig:
        """The stage's own section."""
        return self.section(self.config_class)

    def section(self, kind: type[S]) -> S:
        return self.context.section(kind)

    @property
    def init(self) -> str:
        """The stage whose student this one begins with; "student": the encoder that the section student describes."""
        return str(self.train.init)  # type: ignore[attr-defined]

    @property
    def outside(self) -> tuple[Path, ...]:
        return (self.tensorboard_dir,)

    def progress(self) -> list[Path]:
        return [self.directory / "checkpoints"] if checkpoint_steps(self.directory) else []

    def is_product_missing(self) -> str | None:
        student = self.directory / "student"
        if not (student / "student.json").is_file():
            try:
                check_student(self.directory)  # takes it from a checkpoint, if one has it
            except ValueError:
                return f"{student} is missing"
        return None

    @property
    def cache_dir(self) -> Path:
        """Where a task may keep what it computes once; deleted when the stage is finished."""
        return self.directory / "cache"

    @abstractmethod
    def build(self, setup: Setup) -> Task:
        """The module and data of the stage on this rank."""

    def check(self, reader: ShardReader) -> None:
        """Raises ValueError where the config does not fit the shards; called before anything expensive."""

    def check_early(self, width: int | None, teacher_dim: int | None) -> None:
        """Raises ValueError for what can be known to be wrong before any stage has run.

        width: of the encoder's vectors, for a stage that begins with it; teacher_dim: of the teacher's; None where not known.
        """

    def results(self) -> dict[str, Any]:
        """What DONE.json says besides steps, score and time."""
        return {}

    def inputs(self) -> dict[str, str]:
        manifest = self.context.shards_dir / "manifest.json"
        found = {"shards": sha256_of(manifest) if manifest.is_file() else ""}
        if self.init != "student":
            found[self.init] = stage_fingerprint(self.context.run_dir / self.init)
        elif (encoder := self.section(StudentConfig).init) != "teacher":
            found["student.init"] = model_fingerprint(encoder, self.digests)
        return found

    def run(self, device: torch.device, stop_requested: StopRequested = lambda step: False) -> bool:
        """Trains to the end; every rank calls it. The student lies in <stage>/student afterwards."""
        if rank() == 0:
            self.check_inputs()
            self.begin()
        barrier()
        precision = self.section(EngineConfig).precision
        amp = autocast_dtype(precision, device)
        if rank() == 0:
            logger.info("%s: precision: %s", self.name, describe_precision(precision, device))

        def check_stop() -> None:
            if any_rank(stop_requested(0)):
                raise Stopped(f"{self.name}: stopped on request before its first step")

        task = self.build(self.setup(device, amp, check_stop))
        task.module.to(device)
        trainer = self._trainer(task, device, amp, stop_requested)
        if trainer.tensorboard.is_new:
            trainer.tensorboard.describe(*describe_run(self.context, self.name, self.settings("result"), device))
        with session(self.directory, "train", device):
            try:
                results = trainer.run()
            except torch.OutOfMemoryError:
                raise ValueError(self._out_of_memory()) from None
        if rank() == 0:
            self._finish(results | self.results(), device)
        barrier()
        return True

    def _trainer(self, task: Task, device: torch.device, amp: torch.dtype | None, stop_requested: StopRequested) -> Trainer:
        """The training loop around a task, with its last checkpoint loaded."""
        train, engine_config = self.train, self.section(EngineConfig)
        metrics = StepMetrics(task.module, device)
        temperature = getattr(train, "temperature", None)
        temperature_lr = (temperature.lr if temperature else None) or train.lr
        engine = build_engine(task.module, train, engine_config, num_micro=task.num_micro, temperature_lr=temperature_lr)
        settings, inputs = self.settings("result"), self.inputs()
        must_match = {"settings": settings, "inputs": inputs, "steps_per_epoch": task.steps_per_epoch}
        if task.depends_on_ranks:
            must_match["ranks"] = world_size()
        return Trainer(
            name=self.name,
            task=task,
            engine=engine,
            train=train,
            dev=self.dev_evaluation(amp),
            metrics=metrics,
            checkpoints=Checkpoints(self.directory / "checkpoints", keep=train.keep, device=device, must_match=must_match),
            student_dir=self.directory / "student",
            tensorboard_dir=self.tensorboard_dir,
            device=device,
            max_skipped=engine_config.max_skipped,
            stop_requested=stop_requested,
            selects_by_sts=self.selects_by_sts,
        )

    def _out_of_memory(self) -> str:
        size, name = self.train.micro_batch, self.name
        smaller = f"set {name}.micro_batch={size // 2}, " if size > 1 else ""
        return (
            f"{name}: out of device memory with {name}.micro_batch {size}: {smaller}engine.activation_checkpointing=true, or a"
            " higher ZeRO stage"
        )

    @property
    def tensorboard_dir(self) -> Path:
        return self.context.run_dir / "tensorboard" / self.name

    def check_inputs(self) -> None:
        """Checks, before anything expensive, that the inputs are there and fit. Raises ValueError naming what to run first."""
        reader = ShardReader(self.context.shards_dir, verify=False)
        check_teacher(self.section(TeacherConfig), self.context.shards_dir, reader.manifest)
        if self.init != "student":
            folder = self.context.run_dir / self.init
            if not stage_fingerprint(folder):
                raise ValueError(f"{self.name} needs {folder}, which is not finished: run that stage first")
            check_student(folder)
        elif (encoder := self.section(StudentConfig).init) != "teacher":
            resolve_model(encoder)
        elif (model := self.section(TeacherConfig).model) is not None:
            check_weights(model, self.context.shards_dir, reader.manifest, self.digests)
        self.check(reader)

    def setup(self, device: torch.device, amp: torch.dtype | None, check_stop: CheckStop = never) -> Setup:
        """The shards and the student that the stage begins with, on the device and ready to train, without dropout."""
        reader = ShardReader(self.context.shards_dir)
        torch.manual_seed(self.context.seed)  # new weights, such as the projection's
        student, config = self._initial_student(), self.section(StudentConfig)
        student.train()  # transformers loads encoders in eval mode: without dropout, and without activation checkpointing
        set_dropout(student.encoder, 0.0)
        student.encoder.get_input_embeddings().requires_grad_(not config.freeze_embeddings)
        if self.section(EngineConfig).activation_checkpointing:
            student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        student.to(device)
        if device.type == "cpu":
            student.encoder.set_attn_implementation("eager")  # a third faster than the fused one in bf16 there
        return Setup(reader, student, device, amp, self.context.seed, check_stop)

    def _initial_student(self) -> Student:
        if self.init != "student":
            return Student.load(self.context.run_dir / self.init / "student")
        config = self.section(StudentConfig)
        encoder, tokenizer = build_encoder(config, self.section(TeacherConfig).model, self.context.seed)
        return Student(encoder, tokenizer, pooling=config.pooling, max_length=config.max_length)

    def dev_evaluation(self, amp: torch.dtype | None) -> DevEvaluation | None:
        """The dev evaluation over the held-out shards; None if fewer than three texts were held out."""
        path = self.context.shards_dir / "held_out"
        if not (path / "manifest.json").exists():
            return None
        held_out, value = ShardReader(path), self.context.value
        rows = dev_rows(len(held_out), value("evaluate.num_held_out"), value("evaluate.dev_sentences"))
        if len(rows) < 3:
            return None
        sts: str | None = value("evaluate.sts")
        teacher_sts = read_dev_score(self.context.precompute_dir, sts)
        pairs = read_sts_dev(sts) if sts is not None else None
        batch_size: int = value("evaluate.batch_size")
        return DevEvaluation(held_out, rows, pairs, batch_size=batch_size, amp=amp, teacher_sts=teacher_sts)

    def _finish(self, results: dict[str, Any], device: torch.device) -> None:
        student = self.directory / "student"
        held_out = self.context.shards_dir / "held_out"
        if (held_out / "manifest.json").exists():
            kept = Student.load(student).to(device).eval()
            sources = held_out_sources(self.context.precompute_dir / "text")
            write_projector(self.tensorboard_dir, kept, ShardReader(held_out), sources)
        made = student_fingerprint(student)
        shutil.rmtree(self.cache_dir, ignore_errors=True)  # only now: a stage killed before this needs it again
        self.finish(results, made)
