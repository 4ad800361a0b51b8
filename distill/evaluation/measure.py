"""What is measured of one model: its tasks, fidelity and speed, at each of its sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.evaluation.model_encoder import TextEncoder, throughput
from distill.evaluation.tasks import Tasks
from distill.metrics.fidelity import SMALLEST, fidelity, rows_by_role
from distill.metrics.held_out import final_rows
from distill.metrics.results import TEACHER, VERSION, Fidelity, ModelResults
from distill.metrics.vectors import EncodedTexts, RoleText, encode_by_role
from distill.run.files import fingerprint, sha256_of
from distill.run.recorded_array import save_array
from distill.shards import ShardReader
from distill.shards.format import HELD_OUT
from distill.shards.moments import Moments

logger = logging.getLogger(__name__)
SPEED_TEXTS, CALIBRATION_TEXTS, PCA_TEXTS = 512, 1000, 20_000  # of the training text
Project = Callable[[np.ndarray], np.ndarray]


class Model(NamedTuple):
    """A model to measure. identity: changes when its vectors do. nested, pca: smaller sizes, by truncation and by PCA.
    dtype: what it runs in, where the config says so and not its folder."""

    name: str
    identity: str
    load: Callable[[], TextEncoder]
    nested: tuple[int, ...] = ()
    pca: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def result_names(self) -> list[str]:
        """NAME, NAME-64 for a nested size, NAME-pca-64 for a PCA, in the order in which they are measured."""
        nested = [f"{self.name}-{size}" for size in self.nested]
        return [self.name, *nested, *(f"{self.name}-pca-{size}" for size in self.pca)]


class HeldOut(NamedTuple):
    """Held-out texts with their roles [n], the teacher's vectors of them [n, d], and of parallel text the translations by
    column: the rows that have one, and these with their roles."""

    texts: list[RoleText]
    teacher: np.ndarray
    translations: dict[str, tuple[list[int], list[RoleText]]]


class Measurement:
    """Measures models on `tasks` and on the texts of a shard set: the held-out ones for fidelity, the others for speed, for the
    ranges of int8 and for the PCA."""

    def __init__(self, tasks: Tasks, shards_dir: Path, num_held_out: int, num_dev: int) -> None:
        self.tasks = tasks
        self.reader = ShardReader(shards_dir)
        self.num_held_out, self.num_dev = num_held_out, num_dev

    @cached_property
    def held_out(self) -> HeldOut | None:
        """None if there are too few held-out texts."""
        path = self.reader.directory / HELD_OUT
        if not (path / "manifest.json").exists():
            return None
        reader = ShardReader(path)
        rows = final_rows(len(reader), self.num_held_out, self.num_dev)
        if len(rows) < min(self.num_held_out, len(reader)):
            logger.info("evaluate: fidelity is measured on %d of %d held-out texts", len(rows), len(reader))
        texts = list(zip(reader.roles(rows), reader.texts(rows), strict=True))
        if len(rows) < SMALLEST:
            return None
        translations = {
            column: (positions, [(texts[position][0], text) for position, text in zip(positions, translated, strict=True)])
            for column, (positions, translated) in reader.translations(rows).items()
            if len(positions) >= SMALLEST
        }
        return HeldOut(texts, reader.vectors(rows).astype(np.float32), translations)

    @cached_property
    def _fingerprint(self) -> str:
        shards = sha256_of(self.reader.directory / "manifest.json")
        return fingerprint({"tasks": self.tasks.fingerprint, "shards": shards, "held_out": [self.num_held_out, self.num_dev]})

    def key(self, model: Model, device: str) -> str:
        """Equal for measurements of the same vectors, in the same precision, on the same sets and texts."""
        what = [VERSION, model.identity, model.nested, model.pca, model.dtype, self._fingerprint, device]
        return f"{model.name}-{fingerprint({'measured': what})[:24]}"

    @property
    def documents(self) -> list[RoleText]:
        """The distinct documents of all retrieval sets, sorted: the same for the same sets, which may be named in any order."""
        return sorted((role, text) for role, text in self.tasks.texts if role == "document")

    def measure_asymmetric(self, model: Model, documents_nd: np.ndarray) -> dict[str, ModelResults]:
        """The results of retrieval with the model's queries among the teacher's vectors of `documents`."""
        encoder = model.load()
        queries: list[RoleText] = [(role, text) for role, text in self.tasks.texts if role == "query"]
        vectors = np.concatenate([encode_by_role(encoder, queries), documents_nd])
        retrieval = self.tasks._replace(sts={}, transfer={})
        scores = retrieval.measure(EncodedTexts([*queries, *self.documents], vectors))
        scores |= {"params": encoder.params, "dtype": encoder.dtype}
        scores["texts_per_second"] = round(throughput(encoder, self._training_texts(SPEED_TEXTS)), 1)
        return {model.name: ModelResults(dim=encoder.dim, bytes_per_vector=4 * encoder.dim, **scores)}

    def measure(self, model: Model, keep_documents: Path | None = None) -> dict[str, ModelResults]:
        """The results of each of the model's sizes by name. keep_documents: where its vectors of `documents` are saved, [n, d]
        float32."""
        encoder, held_out, texts = model.load(), self.held_out, self.tasks.texts
        speed = round(throughput(encoder, self._training_texts(SPEED_TEXTS)), 1)
        vectors = encode_by_role(encoder, texts) if texts else None
        if keep_documents is not None and vectors is not None:
            row_of = {text: row for row, text in enumerate(texts)}
            save_array(keep_documents, vectors[[row_of[document] for document in self.documents]])
        held_out_vectors = encode_by_role(encoder, held_out.texts) if held_out else None
        translated = {
            column: (rows, encode_by_role(encoder, translations))
            for column, (rows, translations) in (held_out.translations.items() if held_out else ())
        }
        has_int8 = bool(self.tasks.sts) and "int8" in self.tasks.precisions
        calibration = encoder(self._training_texts(CALIBRATION_TEXTS)) if has_int8 else None
        results: dict[str, ModelResults] = {}
        sizes = (encoder.dim, *model.nested, *model.pca)
        for name, size, project in zip(model.result_names, sizes, self._projections(model, encoder), strict=True):
            scores: dict[str, Any] = {"texts_per_second": speed}
            if held_out and held_out_vectors is not None:
                own, expected = project(held_out_vectors), held_out.teacher
                scores["fidelity"] = _fidelity(own, expected)
                scores["fidelity_by_role"] = {
                    role: _fidelity(own[rows], expected[rows])
                    for role, rows in rows_by_role([role for role, _ in held_out.texts]).items()
                }
                scores["fidelity_of_translations"] = {
                    column: _fidelity(project(vectors_td), expected[rows]) for column, (rows, vectors_td) in translated.items()
                }
            if vectors is not None:
                ranges_from = None if calibration is None else project(calibration)
                scores |= self.tasks.measure(EncodedTexts(texts, project(vectors)), calibration=ranges_from)
            scores |= {"params": encoder.params, "dtype": encoder.dtype}
            results[name] = ModelResults(dim=size, bytes_per_vector=4 * size, **scores)
        return results

    def _projections(self, model: Model, encoder: TextEncoder) -> Iterator[Project]:
        """From the model's vectors to those of each of its sizes."""
        yield lambda vectors: vectors
        for size in model.nested:
            yield lambda vectors, size=size: vectors[:, :size]  # type: ignore[misc]
        if model.pca:
            known = model.name == TEACHER
            moments = self.reader.moments if known else Moments.of(encoder(self._training_texts(PCA_TEXTS)))
            components = moments.pca(max(model.pca))[0].astype(np.float32)
            for size in model.pca:
                yield lambda vectors, size=size: vectors @ components[:size].T  # type: ignore[misc]

    def _training_texts(self, count: int) -> list[str]:
        return self.reader.texts(np.arange(min(count, len(self.reader))))


def _fidelity(student: np.ndarray, teacher: np.ndarray) -> Fidelity:
    return Fidelity(**fidelity(student, teacher), texts=len(student))
