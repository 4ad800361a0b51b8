"""The figures of every row: STS with float32, int8 and binary vectors, fidelity to the teacher, speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from distill.config import RunConfig
from distill.evaluation.encode import Encode, throughput
from distill.evaluation.fidelity import fidelity
from distill.evaluation.quantise import Precision, bytes_per_vector, stored
from distill.evaluation.sts import read_sets, sts_scores
from distill.evaluation.tasks import Encoded
from distill.files import write_json
from distill.precision import autocast_dtype
from distill.shards import ShardReader, fingerprint
from distill.shards.moments import Moments
from distill.stages import read_json
from distill.study.models import Model
from distill.training.dev import split_held_out

PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "binary")
CALIBRATION, PCA_SENTENCES, SPEED_SENTENCES = 1000, 20_000, 512


class Bench:
    """What every row is measured on: the STS sets, held-out sentences; and, from the training text, what int8 and PCA need.

    Models run in engine.precision, as in training.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        assert config.evaluate.sts is not None
        self.amp = autocast_dtype(config.engine.precision, device)
        self.device = device
        self.sts = read_sets(config.evaluate.sts)
        held_out = ShardReader(config.shards_dir / "held_out")
        rows, _ = split_held_out(len(held_out), config.evaluate.num_held_out, config.evaluate.dev_sentences)
        self.held_out, self.teacher = held_out.texts(rows), held_out.vectors(rows).astype(np.float32)
        reader = ShardReader(config.shards_dir)
        self.training = reader.texts(np.arange(min(PCA_SENTENCES, len(reader))))
        pairs = [text for pairs in self.sts.values() for side in (pairs.first, pairs.second) for text in side]
        self.sentences = list(dict.fromkeys([*pairs, *self.held_out, *self.training[:CALIBRATION]]))
        self.of = fingerprint({"sentences": self.sentences, "pca": self.training, "amp": str(self.amp)})

    def rows(self, model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
        """The name and the figures of each row of a model.

        origin: what it is compared with, beside the teacher. shortened: whether it is a part of another row's vectors.
        family: rows that are sizes of one thing.
        """
        loaded = model.load()
        encode = self._in_precision(loaded.encode)
        encoded = Encoded(self.sentences, encode(self.sentences))
        same: dict[str, Any] = {"params": loaded.params, "minutes": model.minutes}
        same["sentences_per_second"] = throughput(encode, self.training[:SPEED_SENTENCES]) if loaded.timed else None
        dim = encoded([self.sentences[0]]).shape[1]
        own = {"origin": model.origin, "family": model.name if model.nested else None}
        for size in [dim, *model.nested]:
            name = model.name if size == dim else f"{model.name}-{size}"
            yield name, same | own | {"shortened": size != dim} | self._figures(encoded.truncated(size))
        if model.pca:
            moments = model.moments() if model.moments else Moments.of(encode(self.training))
            components, _ = moments.pca(max(model.pca))
            projected = Encoded(self.sentences, encoded(self.sentences) @ components.T.astype(np.float32))
            by_pca = {"origin": model.name, "family": f"{model.name}, PCA", "shortened": True}
            for size in model.pca:
                yield f"{model.name}-pca-{size}", same | by_pca | self._figures(projected.truncated(size))

    def _figures(self, encode: Encode) -> dict[str, Any]:
        calibration = encode(self.training[:CALIBRATION])
        dim = calibration.shape[1]
        forms: dict[str, Any] = {}
        for precision in PRECISIONS:
            vectors = stored(encode(self.sentences), precision, calibration)
            scores = sts_scores(Encoded(self.sentences, vectors), self.sts)
            forms[precision] = scores | {"bytes_per_vector": bytes_per_vector(precision, dim)}
        return {"dim": dim, "fidelity": fidelity(encode(self.held_out), self.teacher), "forms": forms}

    def _in_precision(self, encode: Encode) -> Encode:
        def encoded(sentences: list[str]) -> np.ndarray:
            context = torch.autocast(self.device.type, self.amp) if self.amp is not None else nullcontext()
            with context, torch.inference_mode():
                return encode(sentences)

        return encoded


def measure_all(models: Sequence[Model], bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """The rows of all models; each one's are kept in folder/NAME.json, and measured again only if what they are of changes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in tqdm(models, "measure", unit="model", disable=None):
        of = [model.of, bench.of, list(model.nested), list(model.pca)]
        known = read_json(folder / f"{model.name}.json")
        if known is None or known["of"] != of:
            known = {"of": of, "rows": [{"model": name} | row for name, row in bench.rows(model)]}
            write_json(folder / f"{model.name}.json", known)
        rows += known["rows"]
    return rows
