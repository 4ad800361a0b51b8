"""The config of a run: its top-level keys, a section for each stage, and the stages by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from pydantic import create_model, field_validator, model_validator

from distill.corpus.text_config import TextConfig
from distill.evaluation.evaluate_config import EvaluateConfig, SearchConfig
from distill.export.export_config import ExportConfig
from distill.run.config import ConfigError, FileName, FilePath, Section, load_tree, result, speed, validate
from distill.run.files import sweep
from distill.run.stage import RunContext, Stage, is_config_as_written, run_directory, write_run_config
from distill.student.student_config import StudentConfig
from distill.teacher.teacher_config import ShardsConfig, TeacherConfig
from distill.training.tasks import training_tasks
from distill.training.train_config import EngineConfig, TrainConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TRAINING_STAGES = tuple(training_tasks())
OTHER_STAGES = {  # imported on use, so that launchers start faster
    "precompute": "distill.teacher.precompute:PrecomputeStage",
    "export": "distill.export.export_stage:ExportStage",
    "evaluate": "distill.evaluation.evaluate_stage:EvaluateStage",
}
STAGES = ("precompute", *TRAINING_STAGES, "export", "evaluate")


class BaseRunConfig(Section):
    """A run: its directory, its stages, and a section for each of them."""

    name: str = speed(pattern=NAME, description="the run's directory under runs_dir")
    runs_dir: FilePath = speed(Path("runs"), description="the folder of all runs, on a disk shared by all nodes")
    shards_from: FileName | None = speed(
        None,
        description="the run whose text and shards are used, for several students of one teacher and text: a name under"
        " runs_dir, where precompute makes them if they are missing, or the directory of a run; null: this run",
    )
    seed: int = result(0, ge=0, lt=2**63, description="seed of the order of texts, new weights and dropout")
    stages: list[str] = speed(
        ["precompute", "ckd", "finetune", "hpd", "export", "evaluate"],
        description=f"the stages that pipeline.py runs, in this order; known are {', '.join(STAGES)}",
    )
    stage: str = speed("ckd", description=f"the stage that train.py runs: {', '.join(TRAINING_STAGES)}")
    text: TextConfig
    teacher: TeacherConfig
    shards: ShardsConfig = ShardsConfig()
    student: StudentConfig = StudentConfig()
    engine: EngineConfig = EngineConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    search: SearchConfig = SearchConfig()

    @field_validator("stages")
    @classmethod
    def _stages_exist(cls, stages: list[str]) -> list[str]:
        for name in stages:
            _check_name(name, STAGES)
            if stages.count(name) > 1:
                raise ValueError(f"{name} is listed {stages.count(name)} times; a stage runs once")
        return stages

    @field_validator("stage")
    @classmethod
    def _stage_exists(cls, stage: str) -> str:
        _check_name(stage, TRAINING_STAGES)
        return stage

    @model_validator(mode="after")
    def _stages_fit_together(self) -> BaseRunConfig:
        for stage in TRAINING_STAGES:
            if hasattr(self.train(stage), "init"):
                self._check_init(stage)
        for place, stage in enumerate(self.stages):
            if later := [need for need in self.needs(stage) if need in self.stages[place:]]:
                raise ValueError(f"stages {self.stages}: {stage} needs {later[0]}, which is listed after it; put it before")
        if self.teacher.model is None and self.student.init == "teacher":
            what = "a file of vectors" if self.teacher.endpoint is None else "behind an endpoint"
            raise ValueError(f"student.init is teacher, but the teacher is {what}; name an encoder in student.init")
        if self.teacher.vectors is not None and self.shards.reuse:
            raise ValueError("shards.reuse saves an encoder's work, and teacher.vectors has all vectors already; leave it out")
        if self.teacher.model is None and self.text.long != "truncate":
            raise ValueError(
                f"text.long is {self.text.long}, for which the teacher's tokenizer counts, and this teacher has none here:"
                " leave text.long out, or set teacher.model"
            )
        ranks = self.engine.num_ranks or 1
        for stage in TRAINING_STAGES:
            global_batch = self.train(stage).global_batch
            if global_batch < ranks:
                raise ValueError(f"{stage}.global_batch {global_batch} is smaller than engine.num_ranks {ranks}")
        return self

    def needs(self, stage: str) -> list[str]:
        """The stages whose results a stage reads."""
        if stage in TRAINING_STAGES:
            return ["precompute", getattr(self.train(stage), "init", "student")]
        return {"precompute": [], "export": self.training_stages, "evaluate": ["precompute", *self.training_stages, "export"]}[
            stage
        ]

    def _check_init(self, stage: str) -> None:
        known = ["student", *(name for name in TRAINING_STAGES if name != stage)]
        chain = [stage]
        while hasattr(self.train(chain[-1]), "init"):
            init: str = self.train(chain[-1]).init  # type: ignore[attr-defined]
            if init not in ["student", *TRAINING_STAGES]:
                raise ValueError(f"{chain[-1]}.init is {init!r}; it must be one of {', '.join(known)}")
            is_cycle = init in chain
            chain.append(init)
            if is_cycle:
                shown = ", ".join(f"{a}.init is {b}" for a, b in pairwise(chain))
                raise ValueError(f"{shown}: each waits for the other; set one to ckd")
            if init == "student":
                return

    def train(self, stage: str) -> TrainConfig:
        """The section of a training stage."""
        return getattr(self, stage)

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.name

    @property
    def precompute_dir(self) -> Path:
        other = self.shards_from
        return (self.run_dir if other is None else run_directory(self.runs_dir, other)) / "precompute"

    @property
    def shards_dir(self) -> Path:
        return self.precompute_dir.with_name("shards")

    @property
    def training_stages(self) -> list[str]:
        """The training stages of the pipeline, in their order."""
        return [stage for stage in self.stages if stage in TRAINING_STAGES]

    @property
    def trained_stages(self) -> list[str]:
        """The training stages of the pipeline and those that are finished in the run directory, each after its `init`."""
        finished = [name for name in TRAINING_STAGES if (self.run_dir / name / "DONE.json").is_file()]
        names = [*(name for name in finished if name not in self.stages), *self.training_stages]
        return sorted(names, key=self._num_stages_before)

    def _num_stages_before(self, stage: str) -> int:
        init = getattr(self.train(stage), "init", "student")
        return 0 if init == "student" else 1 + self._num_stages_before(init)

    def stage_of(self, name: str) -> Stage:
        """The stage `name` of this run, with the sections that it declares."""
        kind: type[Stage] = training_tasks().get(name) or resolve_name(OTHER_STAGES[name])
        paths = [name, *kind.reads, *kind.covered_by_inputs]
        names = {path.partition(".")[0] for path in paths} & set(type(self).model_fields)
        sections = {each: section for each in sorted(names) if isinstance(section := getattr(self, each), Section)}
        write = partial(write_run_config, self.run_dir, self)
        context = RunContext(self.name, self.run_dir, self.shards_dir, self.seed, tuple(self.trained_stages), sections, write)
        return kind(context)


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"no stage is called {name!r}; known are {', '.join(known)}")


def check_task_names(names: Sequence[str]) -> None:
    """Raises ValueError for a training task whose config section would hide something else of a run's config."""
    taken = {*BaseRunConfig.model_fields, *OTHER_STAGES, *dir(BaseRunConfig)}
    if clash := [name for name in names if name in taken]:
        raise ValueError(f"no training task may be called {', '.join(clash)}: the name has another meaning in a config")


check_task_names(TRAINING_STAGES)
if TYPE_CHECKING:
    RunConfig = BaseRunConfig
else:
    RunConfig = create_model(
        "RunConfig",
        __base__=BaseRunConfig,
        __doc__=BaseRunConfig.__doc__,
        **{name: (task.config_class, task.config_class()) for name, task in training_tasks().items()},
    )


def load_config(path: str | Path, overrides: list[str] | None = None, over: Path | None = None) -> RunConfig:
    """Reads `path` and its base, another YAML `over` it, and `key=value` overrides over both into a validated RunConfig.

    Raises ConfigError with the file, the key, what is allowed and, for an unknown key, the nearest known one.
    """
    return validate(RunConfig, load_tree(path, overrides, over), path)


def load_run(directory: Path) -> RunConfig:
    """The config of the run in `directory`, with the run's place and name as they are now, wherever it was made.

    Raises ConfigError if there is no run, or if its config is not valid.
    """
    directory = directory.resolve() if directory.name == ".." else directory.absolute()  # a link keeps its name
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"no run at {directory}: it has no config.yaml")
    if not is_config_as_written(path):
        raise ConfigError(f"{path} was changed after the run wrote it: start the run's command again, which writes it")
    return load_config(path).model_copy(update={"runs_dir": directory.parent, "name": directory.name})


def stage_of(config: RunConfig, name: str) -> Stage:
    """The stage `name` of a run as its config and inputs are now."""
    return config.stage_of(name)


def open_run(config: RunConfig, stages: Sequence[str] = ()) -> Path:
    """Creates the run directory, clears it of what killed processes left, and returns it. Raises OSError if that fails.

    Raises ValueError, before anything is written, if one of the stages to be run would refuse the config.
    """
    for name in stages:
        if refusal := config.stage_of(name).refusal():
            raise ValueError(refusal)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    sweep(config.run_dir)
    return config.run_dir
