"""The evaluate stage: teacher and exported students side by side, from the folders that others will load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distill.corpus.evaluation_sets import set_fingerprints
from distill.evaluation.evaluate_config import EvaluateConfig, SearchConfig
from distill.evaluation.measure import Measurement, Model
from distill.evaluation.model_encoder import StudentEncoder, encoder_of, warn_of_unused_prompt
from distill.evaluation.neighbours import neighbours
from distill.evaluation.overlap import training_overlap
from distill.evaluation.passage_index import INDEX, build_index
from distill.evaluation.score_tables import format_results
from distill.evaluation.tasks import read_tasks
from distill.export.export_stage import ASYMMETRIC
from distill.export.folder import exports_digests
from distill.metrics.results import TEACHER, ModelResults, read_results, write_results
from distill.metrics.vectors import encode_by_role
from distill.run.files import fingerprint, publish, read_json, sha256_of, write_json
from distill.run.recorded_array import is_saved
from distill.run.session_log import device_name, session
from distill.run.stage import Stage, StopRequested, stage_fingerprint
from distill.student.fingerprint import check_recorded
from distill.student.student_config import StudentConfig
from distill.teacher.encoder import Teacher, evaluation_dtype
from distill.teacher.identity import check_teacher, check_weights, initial_student, pinned
from distill.teacher.teacher_config import TeacherConfig

logger = logging.getLogger(__name__)
UNTRAINED = "untrained"
RESULTS, NEIGHBOURS = "results.json", "neighbours.json"


class EvaluateStage(Stage):
    """Measures the teacher and every exported student; writes results.json, table.txt, neighbours.json and the search index.

    What was measured of a model is kept in <run>/measured by content: a model that this run or another one beside it has
    measured on the same sets is not measured again.
    """

    name = "evaluate"
    reads = ("search",)
    covered_by_inputs = ("teacher", "student")

    def inputs(self) -> dict[str, str]:
        manifest = self.context.shards_dir / "manifest.json"
        export = stage_fingerprint(self.context.run_dir / "export")
        found = {"export": export, "shards": sha256_of(manifest) if manifest.is_file() else ""}
        recorded = (read_json(self.directory / "DONE.json") or {}).get("inputs", {})
        sts, retrieval, transfer = self._sets
        return found | set_fingerprints(sts, retrieval, transfer, self.digests, recorded)

    @property
    def _sets(self) -> tuple[str | None, Sequence[str], Sequence[str]]:
        """What `read_tasks` reads: STS, retrieval, transfer."""
        return self.section.sts, self.section.retrieval or (), self.section.transfer or ()

    def is_product_missing(self) -> str | None:
        done = read_json(self.directory / "DONE.json") or {}
        for path in (self.directory / name for name in done.get("results", {}).get("files", [RESULTS])):
            if not (is_saved(path) if path.suffix == ".npy" else read_json(path)):
                return f"{path} is missing"
        return None

    @property
    def _loads_teacher(self) -> bool:
        """Whether the teacher is a model that one process can hold."""
        config = self.context.section(TeacherConfig)
        return config.model is not None and config.placement != "zero3"

    @property
    def section(self) -> EvaluateConfig:
        return self.context.section(EvaluateConfig)

    def run(self, device: torch.device, stop_requested: StopRequested = lambda step: False) -> bool:
        section, students = self.section, self.context.trained_stages
        export = self.context.run_dir / "export"
        if not stage_fingerprint(export):
            raise ValueError(f"evaluate needs {export}, which is not finished: run the export stage first")
        check_recorded(export, export, exports_digests(export))
        tasks = read_tasks(*self._sets, precisions=section.precision or (), rescore=section.rescore)
        measurement = Measurement(tasks, self.context.shards_dir, section.num_held_out, section.dev_sentences)
        teacher, manifest = self.context.section(TeacherConfig), measurement.reader.manifest
        check_teacher(teacher, self.context.shards_dir, manifest)
        if self._loads_teacher:
            check_weights(teacher, self.context.shards_dir, manifest, self.digests)
        if teacher.endpoint is not None:
            logger.info("evaluate: a teacher behind an endpoint is not measured; fidelity uses its stored vectors")
        models = list(self.models(measurement, device))
        exported = (read_json(export / "DONE.json") or {}).get("results", {})
        asymmetric = exported.get("asymmetric", []) if tasks.retrieval else []
        if asymmetric and not self._loads_teacher:
            logger.info(
                "evaluate: no asymmetric search is measured, for which the teacher would have to embed the documents here"
            )
            asymmetric = []
        if not models:
            raise ValueError(
                "evaluate has nothing to measure: the teacher is no model that runs here, and no stage trains a student"
            )
        self.begin()
        results: dict[str, ModelResults] = {}
        overlap = training_overlap(tasks, measurement.reader) if students else {}
        with session(self.directory, "evaluate", device):
            for model in tqdm(models, desc="evaluate", unit="model", disable=None):
                documents = model.name == TEACHER and bool(asymmetric)
                measured = self._measured(model, measurement, device, keeps_documents=documents)
                for each in measured.values() if model.name in students else ():
                    each.overlap = overlap
                results |= measured
            for stage in asymmetric:
                results |= self._measured_asymmetric(stage, models[0], measurement, device)  # the teacher is the first
            files = self._write_search(students[-1], measurement) if students else []
        write_results(self.directory / RESULTS, results)
        with publish(self.directory / "table.txt") as file:
            file.write(format_results(results).encode() + b"\n")
        made = fingerprint({name: each.to_json() for name, each in results.items()})
        index = students[-1] if students else TEACHER
        self.finish({"models": list(results), "index": index, "files": [RESULTS, *files]}, made)
        return True

    def models(self, measurement: Measurement, device: torch.device) -> Iterator[Model]:
        """The teacher, where one process can hold it, and the exported students in the order of their stages."""
        config, stages = pinned(self.context.section(TeacherConfig), measurement.reader.manifest), self.context.trained_stages
        pca = self._pca_sizes() if self.section.baselines else {}
        teacher = fingerprint({"teacher": measurement.reader.manifest.teacher})
        if self._loads_teacher:
            amp = evaluation_dtype(config, device)
            load = partial(_load_teacher, config, device, amp, self.context.precompute_dir / "offload")
            yield Model(TEACHER, teacher, load, pca=pca.get(TEACHER, ()), dtype=str(amp or torch.float32))
        if self.section.baselines and stages:
            student = initial_student(self.context.section(StudentConfig), config)
            settings = student.model_dump(mode="json", exclude={"freeze_embeddings", "vocabulary"})  # it has all tokens
            identity = fingerprint({"student": settings, "seed": self.context.seed, "teacher": teacher})
            yield Model(UNTRAINED, identity, partial(StudentEncoder, student, config.model, self.context.seed, device))
        nested = (read_json(self.context.run_dir / "export" / "DONE.json") or {}).get("results", {}).get("nested_sizes", {})
        for stage in stages:
            folder = self.context.run_dir / "export" / stage
            load_student = partial(encoder_of, folder, batch_size=self.section.batch_size)
            yield Model(stage, _content(folder), load_student, tuple(nested.get(stage, ())), pca.get(stage, ()))

    def _measured_asymmetric(
        self, stage: str, teacher: Model, measurement: Measurement, device: torch.device
    ) -> dict[str, ModelResults]:
        """A student's queries among the teacher's documents; the teacher was measured, and its vectors kept."""
        folder = self.context.run_dir / "export" / f"{stage}{ASYMMETRIC}"
        identity = fingerprint({"student": _content(folder), "teacher": teacher.identity})
        model = Model(folder.name, identity, partial(encoder_of, folder, batch_size=self.section.batch_size))
        kept = next(path for path in self._kept_documents(teacher, measurement, device) if is_saved(path))
        return self._measured(model, measurement, device, documents=kept)

    def _kept_documents(self, teacher: Model, measurement: Measurement, device: torch.device) -> list[Path]:
        """Where this run or another one beside it keeps the teacher's vectors of the documents of these sets."""
        file = f"{measurement.key(teacher, device_name(device))}-documents.npy"
        return sorted(self.context.run_dir.parent.glob(f"*/measured/{file}"))

    def _measured(
        self,
        model: Model,
        measurement: Measurement,
        device: torch.device,
        *,
        keeps_documents: bool = False,
        documents: Path | None = None,
    ) -> dict[str, ModelResults]:
        """keeps_documents: its vectors of the documents are wanted later. documents: vectors that its queries search."""
        key = measurement.key(model, device_name(device))
        file = f"{key}.json"
        is_kept = not keeps_documents or any(map(is_saved, self._kept_documents(model, measurement, device)))
        for path in [] if not is_kept else sorted(self.context.run_dir.parent.glob(f"*/measured/{file}")):
            try:
                results = read_results(path)
            except ValueError as error:
                if path.exists():  # or it was damaged, and was set aside with a warning
                    logger.warning("%s: an earlier measurement is ignored: %s", model.name, error)
                continue
            if results.keys() == set(model.result_names):
                logger.info("%s: measured before, %s", model.name, path)
                return {name: results[name] for name in model.result_names}
            logger.warning("%s: an earlier measurement is ignored: %s is of %s", model.name, path, ", ".join(results))
        measured = self.context.run_dir / "measured"
        measured.mkdir(exist_ok=True)
        try:
            if documents is not None:
                results = measurement.measure_asymmetric(model, np.load(documents, allow_pickle=False))
            else:
                results = measurement.measure(model, measured / f"{key}-documents.npy" if keeps_documents else None)
        except torch.OutOfMemoryError:
            smaller = max(1, self.section.batch_size // 2)
            raise ValueError(f"{model.name}: out of device memory: set evaluate.batch_size={smaller}") from None
        write_results(measured / file, results)
        return results

    def _pca_sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of every compressed student, by the name of the student it began with and of the teacher."""
        sizes: dict[str, set[int]] = {}
        for stage in self.context.trained_stages:
            done = read_json(self.context.run_dir / stage / "DONE.json") or {}
            settings = done.get("settings", {}).get(stage, {})
            if "dim" in settings:
                for name in (TEACHER, settings["init"]):
                    sizes.setdefault(name, set()).update([settings["dim"], *settings["nested"]])
        return {name: tuple(sorted(found, reverse=True)) for name, found in sizes.items()}

    def _write_search(self, student: str, measurement: Measurement) -> list[str]:
        """Writes the search index of a student, and neighbours.json where texts were held out; returns the files' names."""
        encoder = encoder_of(self.context.run_dir / "export" / student, batch_size=self.section.batch_size)
        build_index(measurement.reader, encoder, self.directory, self.context.section(SearchConfig).max_sentences)
        held_out = measurement.held_out
        if held_out is None:
            return [INDEX]
        texts = [text for _, text in held_out.texts]
        found = neighbours(texts, encode_by_role(encoder, held_out.texts), held_out.teacher)
        write_json(self.directory / NEIGHBOURS, {"model": student, **found})
        return [INDEX, NEIGHBOURS]


def _load_teacher(config: TeacherConfig, device: torch.device, amp: torch.dtype | None, offload: Path) -> Teacher:
    teacher = Teacher(config, device, amp, offload=offload)
    for encoder, model in zip(teacher.encoders, config.models, strict=True):
        warn_of_unused_prompt(encoder.model, model.model)
    return teacher


def _content(folder: Path) -> str:
    """A fingerprint of an exported folder without its model card."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md"]
    return fingerprint({str(path.relative_to(folder)): sha256_of(path) for path in files})
