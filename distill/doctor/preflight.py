"""What can be known of a run before its first stage works: do its models, text, triplets and evaluation sets fit its config?

Only stages that are still to be run are checked. No weights are loaded, no hub is contacted and nothing is written; the server
of a teacher behind an endpoint is sent a few short texts.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from distill.config import RunConfig
from distill.corpus import evaluation_sets
from distill.corpus.sources import check_source, matching_files
from distill.doctor.encoder_files import ModelFolder, json_of, one_line
from distill.evaluation.index_types import index_types
from distill.evaluation.tasks import read_measurable, set_names
from distill.export.formats import require_packages
from distill.export.onnx import check_convertible
from distill.export.sentence_transformers import check_pooling
from distill.plan.architectures import Architecture, full_width, vector_width
from distill.run.model_folders import check_one_route
from distill.run.precision import autocast_dtype
from distill.run.stage import stage_fingerprint
from distill.shards import Manifest
from distill.student import Student
from distill.student.encoder import check_weights_complete, keep_layers, longest_input
from distill.student.initial import check_truncation, initial_settings, pooling_and_length
from distill.student.vocabulary import TokenTable
from distill.teacher.endpoint import EndpointTeacher
from distill.teacher.identity import initial_student, pinned
from distill.teacher.imported import ImportedVectors
from distill.teacher.precompute import PrecomputeStage
from distill.teacher.teacher_config import ModelConfig, TeacherConfig
from distill.training.deepspeed_config import read_deepspeed_config
from distill.training.training_stage import TrainingStage

logger = logging.getLogger(__name__)
ENDPOINT_RETRIES = 2
MAX_OPENED = 16  # files of one source; of more, the first and the last are opened
QUICK_BYTES = 8e6  # an evaluation set of at most this size is read; of a larger one, only the files are looked for


class Problem(NamedTuple):
    """What is wrong with a key of the config, and what to do, in one line."""

    key: str
    what: str

    def __str__(self) -> str:
        return self.what if self.what.startswith(self.key) else f"{self.key}: {self.what}"


def problems(config: RunConfig) -> list[Problem]:
    """What would end one of the run's unfinished stages, in the order of the stages."""
    return _Preflight(config).run()


class _Preflight:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.found: list[Problem] = []
        self.pending = pending_stages(config)
        self.training = [stage for stage in config.training_stages if stage in self.pending]
        self._models: dict[tuple[str, str | None], ModelFolder | None] = {}
        self._encoder_config: PretrainedConfig | None = None  # of the student

    def run(self) -> list[Problem]:
        config = self.config
        if "precompute" in self.pending:
            self._text()
        teacher_dim = self._teacher()
        width = self._student() if any(self._stage(stage).init == "student" for stage in self.training) else None
        for stage in self.training:
            self._inits(stage)
            with self._problem_of(stage), torch.device("meta"):
                self._stage(stage).check_early(width, teacher_dim, self._encoder_config)
        if self.training:
            with self._problem_of("engine.precision"):
                autocast_dtype(config.engine.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            with self._problem_of("engine.deepspeed"):
                read_deepspeed_config(config.engine.deepspeed)
        if "export" in self.pending:
            with self._problem_of("export.formats"):
                require_packages(config.export.formats)
        self._needed_stages()
        self._evaluation_sets()
        first = {problem.what: problem for problem in reversed(self.found)}  # teacher and student may be one folder
        return [problem for problem in dict.fromkeys(self.found) if problem is first[problem.what]]

    @contextmanager
    def _problem_of(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, SafetensorError) as error:
            self.found.append(Problem(key, one_line(error)))

    def _stage(self, name: str) -> TrainingStage:
        stage = self.config.stage_of(name)
        assert isinstance(stage, TrainingStage)
        return stage

    def _text(self) -> None:
        for number, source in enumerate(self.config.text.sources):
            with self._problem_of(f"text.sources[{number}]"):
                files = matching_files(source) if source.type != "huggingface" else []
                patterns = [source.path] if len(files) <= MAX_OPENED else [str(files[0]), str(files[-1])]
                for pattern in patterns:
                    check_source(source.model_copy(update={"path": pattern}))

    def _model(self, name: str, revision: str | None) -> ModelFolder | None:
        key = name, revision
        if key not in self._models:
            self._models[key] = ModelFolder.open(name, revision)
        return self._models[key]

    def _teacher(self) -> int | None:
        """Checks the teacher if it is still to work; returns the width of its vectors if that is known."""
        section, manifest = self.config.teacher, self.config.shards_dir / "manifest.json"
        if "precompute" not in self.pending:
            with self._problem_of("shards"):
                return Manifest.load(manifest.parent).dim if self.training and manifest.is_file() else None
            return None
        if section.vectors is not None:
            with self._problem_of("teacher.vectors"):
                return ImportedVectors(section).dim
            return None
        if section.endpoint is not None:
            with self._problem_of("teacher.endpoint"):
                return _ask_endpoint(section)
            return None
        widths: list[int] = []
        for number, model in enumerate(section.models):
            key = f"teacher.concat[{number - 1}]" if number else "teacher"
            with self._problem_of(f"{key}.model"):
                folder = self._model(model.model or "", model.revision)
                if folder is not None:
                    check_one_route(folder.path)
                    check_weights_complete(folder.path)
                    hidden_size = getattr(folder.config, "hidden_size", 0)
                    self.found += _teacher_problems(key, model, folder, full_width(folder.path, hidden_size))
                    if width := vector_width(folder.path, hidden_size, model.dimensions):
                        widths.append(width)
        with self._problem_of("shards.reuse"):
            stage = self.config.stage_of("precompute")
            assert isinstance(stage, PrecomputeStage)
            stage.reused_runs(section.precision)
        return sum(widths) if len(widths) == len(section.models) else None

    def _shards_teacher(self) -> TeacherConfig:
        """The teacher, at the commit that made the shards where they are finished."""
        if "precompute" in self.pending or not (self.config.shards_dir / "manifest.json").is_file():
            return self.config.teacher
        return pinned(self.config.teacher, Manifest.load(self.config.shards_dir))

    def _student(self) -> int | None:
        """Checks the encoder that training begins with; returns the width of the student's vectors if that is known."""
        section = self.config.student
        name = self.config.teacher.model if section.init == "teacher" else section.init
        before = len(self.found)
        with self._problem_of("student.init"):
            initial = initial_student(section, self._shards_teacher())
            folder = self._model(name or "", initial.revision)
            if folder is None:
                return None
            check_one_route(folder.path)
            if not folder.is_transformer:
                raise ValueError(f"{folder.path} is no transformer; name an encoder with layers in student.init")
            if not folder.tokenizer.is_fast:
                raise ValueError(f"{folder.path} has only a slow tokenizer; name a model with a tokenizer.json")
            if not any((folder.tokenizer.pad_token, folder.tokenizer.eos_token, folder.tokenizer.unk_token)):
                raise ValueError(
                    f"the tokenizer of {folder.path} has no token to pad with; set `pad_token` in its tokenizer_config.json"
                )
            folder.check_tokens()
            if not section.from_scratch:
                check_weights_complete(folder.path)
            assert folder.config is not None
            self._encoder_config = folder.config
            if section.vocabulary is not None:
                with self._problem_of("student.vocabulary"):
                    TokenTable(folder.tokenizer, folder.config).check(section.vocabulary)
            with torch.device("meta"):
                encoder = Architecture(folder.config, 0, False).build()
            if section.layers is not None:
                with self._problem_of("student.layers"):
                    keep_layers(encoder, section.kept(encoder.config.num_hidden_layers))
            if section.pooling == "pooler" and getattr(encoder, "pooler", None) is None:
                self.found.append(
                    Problem("student.pooling", f"pooler, but the encoder of {folder.path} has none; use cls or mean")
                )
            elif section.pooling == "pooler" and not section.from_scratch and not folder.has_pooler:
                self.found.append(
                    Problem("student.pooling", f"pooler, but {folder.path} has no weights of one; use cls or mean")
                )
            settings = initial_settings(initial, folder.path, has_weights=False)
            pooling, max_length = pooling_and_length(section, settings, folder.tokenizer.model_max_length)
            student = Student(encoder, folder.tokenizer, pooling=pooling, max_length=max_length, settings=settings)
            with self._problem_of("student.truncate_dim"):
                check_truncation(section, student)  # of the teacher's dimensions, `_teacher` speaks
            with self._problem_of("student.pooling"):
                if "export" in self.pending:
                    check_pooling(pooling)
            width = student.width if len(self.found) == before else None
            if "export" in self.pending and self.config.export.formats:
                with self._problem_of("export.formats"):
                    require_packages(self.config.export.formats)
                    check_convertible(student, has_all_tokens=section.vocabulary is None)
            return width
        return None

    def _needed_stages(self) -> None:
        finished = {
            "precompute": (self.config.shards_dir / "manifest.json").is_file(),  # a copy may have the shards alone
            "export": bool(stage_fingerprint(self.config.run_dir / "export")),
        }
        absent = [need for need, is_finished in finished.items() if need not in self.config.stages and not is_finished]
        for stage in self.pending:
            for need in absent:
                if need in self.config.needs(stage):
                    what = f"{stage} needs {need}, which is neither finished nor among the stages: add it"
                    self.found.append(Problem("stages", what))

    def _inits(self, stage: str) -> None:
        init = self._stage(stage).init
        if init != "student" and init not in self.config.stages and not stage_fingerprint(self.config.run_dir / init):
            what = f"{init} is neither finished nor among the stages: add it, or set {stage}.init to another stage"
            self.found.append(Problem(f"{stage}.init", what))

    def _evaluation_sets(self) -> None:
        section = self.config.evaluate
        if section.sts not in (None, "hub") and self.pending:  # training and precompute read its dev set
            with self._problem_of("evaluate.sts"):
                evaluation_sets.read_sts(str(section.sts))
                evaluation_sets.read_sts_dev(str(section.sts))
        if "evaluate" not in self.pending:
            return
        kinds: dict[str, tuple[Sequence[str], Callable[[str], Any], Callable[[Path], Any]]] = {
            "retrieval": (section.retrieval or (), evaluation_sets.read_retrieval, evaluation_sets.retrieval_files),
            "transfer": (section.transfer or (), read_measurable, lambda folder: None),
        }
        for kind, (places, read, look) in kinds.items():
            with self._problem_of(f"evaluate.{kind}"):
                set_names(places)
            for place in places:
                if not place.startswith(evaluation_sets.PREFIX):
                    with self._problem_of(f"evaluate.{kind}"):
                        read(place) if _num_bytes(Path(place)) <= QUICK_BYTES else look(Path(place))
        with self._problem_of("evaluate.rescore"):
            needs_index = bool(index_types((), section.precision or (), section.rescore))
            if needs_index and section.retrieval and importlib.util.find_spec("faiss") is None:
                what = "quantised retrieval needs faiss: bash launcher/install.sh quickstart,retrieval, or leave it out"
                self.found.append(Problem("evaluate.precision", what))


def pending_stages(config: RunConfig) -> list[str]:
    """The run's stages that are unfinished, or that need one of these."""
    pending: list[str] = []
    for name in config.stages:
        if any(need in pending for need in config.needs(name)) or config.stage_of(name).reason_to_run() is not None:
            pending.append(name)
    return pending


def _ask_endpoint(section: TeacherConfig) -> int:
    """The width of an endpoint's vectors, by one request, which is logged. Raises ValueError or TemporaryError if it fails."""
    assert section.endpoint is not None
    retries = min(ENDPOINT_RETRIES, section.endpoint.retries)
    teacher = EndpointTeacher(section.model_copy(update={"endpoint": section.endpoint.model_copy(update={"retries": retries})}))
    started = time.perf_counter()
    teacher.probe()
    milliseconds = 1e3 * (time.perf_counter() - started)
    logger.info("teacher.endpoint: %s: %d dimensions, first answer in %.0f ms", teacher, teacher.dim, milliseconds)
    return teacher.dim


def _teacher_problems(key: str, model: ModelConfig, folder: ModelFolder, width: int) -> Iterator[Problem]:
    """Why a model of this width cannot encode as its section, `key`, says; width 0 is not known.

    Raises ValueError for files that do not fit together.
    """
    path, has_modules = folder.path, (folder.path / "modules.json").is_file()
    if not has_modules and model.pooling is None:
        yield Problem(f"{key}.pooling", f"{path} is a plain encoder (no modules.json): say how it pools, cls, pooler or mean")
    if model.pooling is not None and (not folder.is_transformer or (has_modules and model.pooling == "pooler")):
        yield Problem(f"{key}.pooling", f"{path} is no plain encoder and names its own pooling; leave `pooling` out")
    if model.pooling == "pooler" and not folder.has_pooler:
        yield Problem(f"{key}.pooling", f"pooler, but {path} has no weights of one; use cls or mean")
    if has_modules and model.prompt_name is not None:
        prompts = json_of(path / "config_sentence_transformers.json").get("prompts") or {}
        if model.prompt_name not in prompts:
            yield Problem(f"{key}.prompt_name", f"{path} has no prompt {model.prompt_name!r}, but {sorted(prompts)}")
    if folder.config is not None:
        folder.check_tokens()
        limit = longest_input(folder.config)
    if model.max_length is not None and folder.config is None:
        yield Problem(f"{key}.max_length", f"{path} reads whole texts, of any length; leave it out")
    elif model.max_length is not None and model.max_length > limit:
        what = f"{model.max_length} is above the {limit} positions of {path}; lower it, or leave it out"
        yield Problem(f"{key}.max_length", what)
    if model.dimensions is not None and model.dimensions > (width or model.dimensions):
        what = f"{model.dimensions} is above the {width} dimensions of {path}; lower it, or leave it out"
        yield Problem(f"{key}.dimensions", what)


def _num_bytes(folder: Path) -> int:
    """Of a folder's files; compressed ones count three times."""
    return sum(file.stat().st_size * (3 if file.suffix == ".gz" else 1) for file in folder.rglob("*") if file.is_file())
