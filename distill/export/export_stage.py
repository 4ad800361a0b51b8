"""The export stage: every trained student of a run as a folder under runs/NAME/export."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.corpus.text_config import TextConfig
from distill.export.card import Provenance, model_card
from distill.export.export_config import ExportConfig
from distill.export.folder import export_student, exports_digests
from distill.export.formats import require_packages
from distill.export.sentence_transformers import check_pooling
from distill.run.files import read_json
from distill.run.session_log import session
from distill.run.stage import Stage, StopRequested, stage_fingerprint
from distill.shards import ShardReader
from distill.student.fingerprint import check_student, files_fingerprint
from distill.student.student import student_in_teacher_space
from distill.student.student_config import StudentConfig
from distill.teacher.teacher_config import TeacherConfig
from distill.training.tasks import training_tasks

logger = logging.getLogger(__name__)
ASYMMETRIC = "-asymmetric"  # after a stage's name: its folder for queries against the teacher's vectors
NUM_CHECKED = 1000


class ExportStage(Stage):
    """Exports the students of all training stages of the run."""

    name = "export"
    covered_by_inputs = ("text", "teacher", "student")

    def inputs(self) -> dict[str, str]:
        return {stage: stage_fingerprint(self.context.run_dir / stage) for stage in self.context.trained_stages}

    def run(self, device: torch.device, stop_requested: StopRequested = lambda step: False) -> bool:
        """Raises ValueError before any work if a stage or a package that export.formats needs is missing, if a student's
        weights changed or its pooling cannot be exported; and if a written format does not agree with its student."""
        formats = self.formats()
        require_packages(formats)
        for name, found in self.inputs().items():
            if not found:
                raise ValueError(f"export needs {self.context.run_dir / name}, which is not finished: run that stage first")
            check_student(self.context.run_dir / name)
            check_pooling((read_json(self._student(name) / "student.json") or {}).get("pooling", ""))
        reader = ShardReader(self.context.shards_dir)
        check_on = reader.texts(list(range(min(NUM_CHECKED, len(reader)))))
        is_asymmetric = self.context.section(ExportConfig).asymmetric or bool(self._of_unchanged_students("asymmetric"))
        asymmetric: list[str] = []
        self.begin()
        folders: dict[str, str] = {}
        nested: dict[str, list[int]] = {}
        cosines: dict[str, dict[str, dict[str, float]]] = {}
        with session(self.directory, "export", torch.device("cpu")):
            for name in self.context.trained_stages:
                out, provenance = self.directory / name, self.provenance(name)
                card = partial(model_card, provenance=provenance)
                agreements = export_student(self._student(name), out, card=card, check_on=check_on, formats=formats)
                folders[name], nested[name] = str(out), provenance.nested
                cosines[name] = {each: {"worst": found.worst, "mean": found.mean} for each, found in agreements.items()}
                logger.info("%s: %s", name, out)
                if is_asymmetric and self._export_asymmetric(name, check_on, formats):
                    asymmetric.append(name)
                else:
                    shutil.rmtree(self.directory / f"{name}{ASYMMETRIC}", ignore_errors=True)
        results = {"folders": folders, "formats": formats, "nested_sizes": nested, "cosines": cosines, "asymmetric": asymmetric}
        files = exports_digests(self.directory)
        self.finish(results, files_fingerprint(files), files)
        return True

    def _export_asymmetric(self, name: str, check_on: list[str], formats: list[str]) -> bool:
        """False if the student has not learned the teacher's space."""
        student, out = student_in_teacher_space(self._student(name)), self.directory / f"{name}{ASYMMETRIC}"
        if student is None:
            logger.info("%s: no asymmetric export, it was not trained in the teacher's own space", name)
            return False
        card = partial(model_card, provenance=replace(self.provenance(name), is_asymmetric=True))
        export_student(self._student(name), out, card=card, check_on=check_on, formats=formats, student=student)
        logger.info("%s: for queries against the teacher's vectors: %s", name, out)
        return True

    def formats(self) -> list[str]:
        """Those of the config; where the students are unchanged, also those that they are exported to already."""
        wanted = list(self.context.section(ExportConfig).formats)
        return [*wanted, *(name for name in self._of_unchanged_students("formats") if name not in wanted)]

    def _of_unchanged_students(self, result: str) -> list[str]:
        """A result of the stage's last run, if it was of these students."""
        done = read_json(self.directory / "DONE.json") or {}
        found: list[str] = done.get("results", {}).get(result, []) if done.get("inputs") == self.inputs() else []
        return found

    def is_product_missing(self) -> str | None:
        asymmetric = [f"{name}{ASYMMETRIC}" for name in self._of_unchanged_students("asymmetric")]
        folders = (self.directory / name / "modules.json" for name in [*self.context.trained_stages, *asymmetric])
        return next((f"{path.parent} is missing" for path in folders if not path.is_file()), None)

    def provenance(self, stage: str) -> Provenance:
        """What the student of a finished training stage was made from."""
        teacher, student = self.context.section(TeacherConfig), self.context.section(StudentConfig)
        sources = self.context.section(TextConfig).sources
        done: dict[str, Any] = read_json(self.context.run_dir / stage / "DONE.json") or {}
        recipe = done.get("settings", {}).get(stage, {})
        base = teacher.model if student.init == "teacher" else student.init
        return Provenance(
            run=self.context.name,
            stage=stage,
            method=training_tasks()[stage].title,
            base_model=base or "",
            teachers=teacher.names,
            sources=[source.name or source.path or source.type for source in sources],
            recipe=recipe,
            nested=done.get("results", {}).get("nested_sizes", []),
            text=read_json(self.context.precompute_dir / "text" / "manifest.json"),
            earlier=self._settings_before(recipe),
            samples={name: self._num_samples(name) for name in [*self._settings_before(recipe), stage]},
            language=self.context.section(ExportConfig).language,
        )

    def _num_samples(self, stage: str) -> int:
        done = read_json(self.context.run_dir / stage / "DONE.json") or {}
        return int(done.get("results", {}).get("texts", 0))

    def _settings_before(self, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The settings of the stages that a stage with these was initialised from, by name, from the first on."""
        name = settings.get("init", "student")
        if name == "student" or name not in training_tasks():
            return {}
        done = read_json(self.context.run_dir / name / "DONE.json") or {}
        before: dict[str, Any] = done.get("settings", {}).get(name, {})
        return {**self._settings_before(before), name: before}

    def _student(self, stage: str) -> Path:
        return self.context.run_dir / stage / "student"
