"""A training stage: assembles a task from the config, and runs it on all ranks to its end or from its last checkpoint."""

from __future__ import annotations

import logging
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from transformers import PretrainedConfig

from distill.corpus import held_out_sources
from distill.corpus.evaluation_sets import read_sts_dev
from distill.corpus.text_config import TextConfig
from distill.metrics.fidelity import SMALLEST
from distill.metrics.held_out import dev_rows
from distill.run.collectives import any_rank, barrier, rank, world_size
from distill.run.config import Effect, Section
from distill.run.files import read_json, sha256_of
from distill.run.hub import model_commit
from distill.run.model_folders import model_fingerprint, resolve_model
from distill.run.precision import autocast_dtype, describe_precision
from distill.run.sampling import CHUNK_ROWS, CHUNK_ROWS_ON_GPU, GlobalOrder, SampleSource, TokenBudget, first_of_permutation
from distill.run.session_log import session
from distill.run.stage import Stage, StopRequested, checkpoint_steps, stage_fingerprint
from distill.run.stopping import CheckStop, Stopped, never
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_cpu_attention, set_dropout
from distill.student.fingerprint import check_student, files_fingerprint, student_digests
from distill.student.initial import build_student, describe_initial, initial_folder
from distill.student.student_config import StudentConfig, VocabularyConfig
from distill.student.vocabulary import read_kept, trim, trim_and_describe, write_kept
from distill.teacher.dev_score import read_dev_score
from distill.teacher.identity import check_teacher, check_weights, initial_student, pinned
from distill.teacher.teacher_config import TeacherConfig
from distill.training.batches import ShardBatches, report_order, token_budget
from distill.training.checkpoint import Checkpoints
from distill.training.dashboard import describe_run
from distill.training.dev_evaluation import DevEvaluation
from distill.training.encoded_cache import Encoded
from distill.training.engine import build_engine
from distill.training.loop import Trainer
from distill.training.mixture import check_mixture, mixture_of
from distill.training.projector import write_projector
from distill.training.samples import Samples
from distill.training.shard_verification import open_verified
from distill.training.step_metrics import StepMetrics
from distill.training.task import Task
from distill.training.train_config import EngineConfig, TrainConfig

logger = logging.getLogger(__name__)
TRUNCATION_SAMPLE = 2000  # texts
VOCABULARY = "vocabulary.json"  # the tokens that are kept, of an unfinished stage
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Setup:
    """What a task is built from, on this rank. mixture: the sources of the shards' texts, where they have weights."""

    reader: ShardReader
    student: Student
    device: torch.device
    amp: torch.dtype | None
    seed: int
    check_stop: CheckStop = never
    mixture: Sequence[SampleSource] = ()

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS if self.device.type == "cpu" else CHUNK_ROWS_ON_GPU

    def shard_batches(
        self, train: TrainConfig, encoded: Encoded | None = None, *, tokens_per_batch: int | None = None
    ) -> ShardBatches:
        """The steps over the shards. encoded: a frozen encoder's vectors, instead of tokens; they are cut by `micro_batch`."""
        order = GlobalOrder(self.reader.shard_rows, global_batch=train.global_batch, seed=self.seed, sources=self.mixture)
        report_order(order)
        micro_batch: int | TokenBudget = train.micro_batch
        if tokens_per_batch is not None and encoded is None:
            micro_batch = token_budget(tokens_per_batch, self.reader, self.student)
        part: dict[str, Any] = {"micro_batch": micro_batch, "rank": rank(), "world_size": world_size()}
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
    kept_by_content = ("cache",)
    reads = (
        "student",
        "engine.precision",
        "evaluate.dev_sentences",
        "evaluate.sts",
    )
    effects: ClassVar[dict[str, Effect]] = {
        "evaluate.dev_sentences": "selection",
        "evaluate.sts": "selection",
    }
    covered_by_inputs = ("text", "teacher", "engine", "evaluate.batch_size")  # the shards are the text's and the teacher's

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

    def settings(self, effect: Effect) -> dict[str, Any]:
        """With the weights of the text's sources, where they have any: of the text, only these are not in the shards."""
        weights = self.section(TextConfig).weights if effect == "result" else []
        mixture = {"text": {"sources": [{"weight": weight} for weight in weights]}} if weights else {}
        return super().settings(effect) | mixture

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

    @property
    def reads_all_shards(self) -> bool:
        """Whether training reads from all shards, which are then verified before the first step, once on every node."""
        return True

    @abstractmethod
    def build(self, setup: Setup) -> Task:
        """The module and data of the stage on this rank."""

    def check(self, reader: ShardReader) -> None:
        """Raises ValueError where the config does not fit the shards; called before anything expensive."""

    def check_early(self, width: int | None, teacher_dim: int | None, encoder_config: PretrainedConfig | None = None) -> None:
        """Raises ValueError for what can be known to be wrong before any stage has run.

        width: of the encoder's vectors, for a stage that begins with it; teacher_dim: of the teacher's; encoder_config: the
        student's; each None where it is not known.
        """

    def results(self) -> dict[str, Any]:
        """What DONE.json says besides steps, score and time."""
        return {}

    def inputs(self) -> dict[str, str]:
        manifest = self.context.shards_dir / "manifest.json"
        found = {"shards": sha256_of(manifest) if manifest.is_file() else ""}
        if self.init != "student":
            return found | {self.init: stage_fingerprint(self.context.run_dir / self.init)}
        student = self.section(StudentConfig)
        if student.init != "teacher":
            found["student.init"] = model_fingerprint(student.init, self.digests) or self._hub_commit()
        if student.vocabulary is not None and student.vocabulary.tokens is not None:
            found["student.vocabulary.tokens"] = self.digest(Path(student.vocabulary.tokens))
        return found

    def _hub_commit(self) -> str:
        """The commit of the hub model that the student begins with: what was recorded when the stage began stays; '' for a
        folder, and where it is not known."""
        section = self.section(StudentConfig)
        with suppress(ValueError):  # from `resolve_model`: another check names what is missing
            if Path(resolve_model(section.init)).is_dir():
                return ""
        recorded, begun_with = self.recorded_inputs(), self.recorded_settings().get("student", {})
        is_same = begun_with.get("init") == section.init and begun_with.get("revision") == section.revision
        if is_same and "student.init" in recorded:
            return recorded["student.init"]
        return model_commit(section.init, section.revision)

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

        try:
            task = self.build(self.setup(device, amp, check_stop))
            task.module.to(device)
            trainer = self._trainer(task, device, amp, stop_requested)
            if trainer.tensorboard.is_new:
                trainer.tensorboard.describe(*describe_run(self.context, self.name, self.settings("result"), device))
            with session(self.directory, "train", device):
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
        tokens: int | None = getattr(self.train, "tokens_per_batch", None)
        key, size = (
            (f"{self.name}.micro_batch", self.train.micro_batch)
            if tokens is None
            else (f"{self.name}.tokens_per_batch", tokens)
        )
        smaller = f"set {key}={size // 2}, " if size > 1 else ""
        return (
            f"{self.name}: out of device memory with {key} {size}: {smaller}engine.activation_checkpointing=true, or a"
            " higher ZeRO stage"
        )

    @property
    def tensorboard_dir(self) -> Path:
        return self.context.run_dir / "tensorboard" / self.name

    def check_inputs(self) -> None:
        """Checks, before anything expensive, that the inputs are there and fit. Raises ValueError naming what to run first."""
        reader = ShardReader(self.context.shards_dir, verify=False)
        check_teacher(self.section(TeacherConfig), self.context.shards_dir, reader.manifest)
        check_mixture(self.section(TextConfig), reader.manifest)
        results = (read_json(self.context.precompute_dir / "DONE.json") or {}).get("results", {})
        held_out = self.context.shards_dir / "held_out" / "manifest.json"
        if results.get("held_out") and not held_out.exists():
            raise ValueError(f"{held_out} is missing: run the precompute stage again, which writes it")
        if self.init != "student":
            folder = self.context.run_dir / self.init
            if not stage_fingerprint(folder):
                raise ValueError(f"{self.name} needs {folder}, which is not finished: run that stage first")
            check_student(folder)
        elif (encoder := self.section(StudentConfig).init) != "teacher":
            resolve_model(encoder)
        elif self.section(TeacherConfig).model is not None:
            check_weights(self.section(TeacherConfig), self.context.shards_dir, reader.manifest, self.digests)
        self.check(reader)

    def setup(self, device: torch.device, amp: torch.dtype | None, check_stop: CheckStop = never) -> Setup:
        """The shards and the student that the stage begins with, on the device and ready to train, without dropout."""
        shards_dir = self.context.shards_dir
        reader = open_verified(shards_dir, device, check_stop) if self.reads_all_shards else ShardReader(shards_dir)
        torch.manual_seed(self.context.seed)  # new weights, such as the projection's
        student, config = self._initial_student(reader, check_stop), self.section(StudentConfig)
        student.train()  # transformers loads encoders in eval mode: without dropout, and without activation checkpointing
        set_dropout(student.encoder, 0.0)
        student.encoder.get_input_embeddings().requires_grad_(not config.freeze_embeddings)
        if self.section(EngineConfig).activation_checkpointing:
            student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        student.to(device)
        if device.type == "cpu":
            set_cpu_attention(student.encoder, student.max_length)
        if rank() == 0:
            self._report_truncated(student, reader)
        mixture = mixture_of(reader, self.section(TextConfig))
        return Setup(reader, student, device, amp, self.context.seed, check_stop, mixture)

    def _report_truncated(self, student: Student, reader: ShardReader) -> None:
        """Logs how many of the texts, by a sample, the student reads less of than the teacher did."""
        from distill.teacher.long_text import characters_read  # imports sentence-transformers

        rows = first_of_permutation(len(reader), min(TRUNCATION_SAMPLE, len(reader)), self.context.seed)
        truncated = rows[student.is_truncated(reader.texts(rows), reader.roles(rows))]
        texts, roles = reader.texts(truncated), reader.roles(truncated)
        by_teacher = characters_read(self.section(TeacherConfig), texts, roles) if texts else None
        num_cut, where = len(texts), ""
        if by_teacher is not None:
            num_cut, where = (
                int(np.count_nonzero(student.characters_read(texts, roles) < by_teacher)),
                " where the teacher reads on",
            )
        if num_cut:
            words = "%s: about %.1f%% of the texts (of %s sampled) are cut at %d tokens%s (student.max_length)"
            sampled = f"{len(rows):,}"
            logger.info(words, self.name, 100 * num_cut / len(rows), sampled, student.max_length, where)

    def _initial_student(self, reader: ShardReader, check_stop: CheckStop) -> Student:
        if self.init != "student":
            return Student.load(self.context.run_dir / self.init / "student")
        teacher = pinned(self.section(TeacherConfig), reader.manifest)
        config = initial_student(self.section(StudentConfig), teacher)
        if config.init != "teacher" and (commit := self._hub_commit()):
            config = config.model_copy(update={"revision": commit})
        student = build_student(config, teacher.model, self.context.seed)
        if rank() == 0:
            what = describe_initial(config, student, initial_folder(config, teacher.model))
            logger.info("%s: the student begins with: %s", self.name, what)
        if config.vocabulary is not None:
            self._trim_vocabulary(student, config.vocabulary, reader, check_stop)
        return student

    def _trim_vocabulary(self, student: Student, config: VocabularyConfig, reader: ShardReader, check_stop: CheckStop) -> None:
        """Leaves the student the tokens that rank 0 selects, once for a stage: a resumed one reads the same list."""
        path, held_out = self.directory / VOCABULARY, self.context.shards_dir / "held_out"
        selecting: Iterator[int] = iter(())
        if rank() == 0 and read_kept(path) is None:
            selecting = write_kept(path, config, student, Samples(reader))
        while any_rank(next(selecting, None) is not None):  # so that no rank waits longer than for a block
            check_stop()
        kept = read_kept(path)
        assert kept is not None
        if rank() == 0:
            measured = ShardReader(held_out) if (held_out / "manifest.json").exists() else None
            logger.info("%s: vocabulary: %s", self.name, trim_and_describe(student, kept, measured))
        else:
            trim(student, kept)

    def dev_evaluation(self, amp: torch.dtype | None) -> DevEvaluation | None:
        """The dev evaluation over the held-out shards; None if fewer than three texts were held out."""
        path = self.context.shards_dir / "held_out"
        if not (path / "manifest.json").exists():
            return None
        held_out, value = ShardReader(path), self.context.value
        rows = dev_rows(len(held_out), value("evaluate.dev_sentences"))
        if len(rows) < SMALLEST:
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
        files = student_digests(student)
        shutil.rmtree(self.cache_dir, ignore_errors=True)  # only now: a stage killed before this needs it again
        (self.directory / VOCABULARY).unlink(missing_ok=True)
        self.finish(results, files_fingerprint(files), files)
