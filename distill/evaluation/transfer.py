"""Transfer, as SentEval has it: a logistic regression on frozen vectors, and how often it names the right label.

    train.tsv(.gz)     a header line with the columns label and text (others are ignored)
    test.tsv(.gz)      the same; without it, the accuracy is of 10-fold cross-validation over train
    dev.tsv(.gz)       the same; without it, a random tenth of what is trained on serves to choose the L2 strength

    hub:OWNER/NAME     a dataset with the columns text and label, and the splits train, test and validation

Vectors are L2-normalised, so that a model's scale is not mistaken for its quality; the strengths tried are SentEval's range for
vectors of that length. With the chosen one the regression is fitted again on train and dev together.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.evaluation.bootstrap import draws, identity, interval, means
from distill.evaluation.encode import Encode, unit
from distill.evaluation.hub import PREFIX, is_on_hub, read_rows, splits_of
from distill.evaluation.tsv import read_tsv

STRENGTHS = tuple(4.0**power for power in range(6))  # of C, the inverse of the L2 penalty; ascending
FOLDS = 10
SMALLEST = 20


class Labelled(NamedTuple):
    texts: list[str]
    labels: list[str]


class TransferSet(NamedTuple):
    train: Labelled
    dev: Labelled | None
    test: Labelled | None

    @property
    def texts(self) -> list[str]:
        return [text for part in self if part is not None for text in part.texts]


def read_transfer(where: str | Path) -> TransferSet:
    """Of a folder, or of hub:OWNER/NAME. Raises ValueError that says what is missing or malformed, and where."""
    if is_on_hub(where):
        name = str(where).removeprefix(PREFIX)
        splits = splits_of(name)
        parts = [_hub_part(name, split) if split in splits else None for split in ("train", "validation", "test")]
    else:
        folder = Path(where)
        if not folder.is_dir():
            raise ValueError(f"no classification set at {folder}: no such folder")
        parts = [_part(folder, split) for split in ("train", "dev", "test")]
    train, dev, test = parts
    if train is None:
        raise ValueError(f"no classification set at {where}: it has no train.tsv or train.tsv.gz (on the hub: split train)")
    if len(train.labels) < SMALLEST or len(set(train.labels)) < 2:
        raise ValueError(
            f"{where} has {len(train.labels)} rows of {len(set(train.labels))} labels to train on;"
            f" it takes {SMALLEST} rows and 2 labels or more"
        )
    return TransferSet(train, dev, test)


def transfer_scores(encode: Encode, sets: Mapping[str, TransferSet], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The accuracy on each set, in 0..1, with a 95% interval from `bootstrap` resamples of the tested texts.

    {"transfer": {"sst2": {"accuracy": .., "majority": .., "labels": .., "train": .., "test": .., "C": ..}},
     "transfer_ci": {"sst2": {"accuracy": [low, high]}}, "transfer_resamples": {"sst2": {"of": .., "accuracy": [..]}}}

    majority is the accuracy of always naming the most frequent label; C the inverse L2 strength that was chosen, the median
    over folds where there is no test set, and then `test` counts train.
    """
    results: dict[str, Any] = {"transfer": {}, "transfer_ci": {}, "transfer_resamples": {}}
    for name, given in sets.items():
        train = _vectors(encode, given.train)
        dev = _vectors(encode, given.dev) if given.dev is not None else None
        if given.test is not None:
            tested = given.test
            right, strength = _fitted(train, dev, _vectors(encode, tested), seed)
        else:
            tested = given.train
            right, strength = _cross_validated(train, dev, seed)
        of = identity(seed, {"texts": tested.texts, "labels": tested.labels})
        resampled = means(right.astype(np.float64), draws(of, len(right), bootstrap))
        _, counts = np.unique(tested.labels, return_counts=True)
        results["transfer"][name] = {
            "accuracy": float(right.mean()),
            "majority": float(counts.max() / counts.sum()),
            "labels": len(set(given.train.labels)),
            "train": len(given.train.labels),
            "test": len(tested.labels),
            "C": strength,
        }
        results["transfer_ci"][name] = {"accuracy": interval(resampled)} if bootstrap else {}
        results["transfer_resamples"][name] = {"of": of, "accuracy": resampled.round(5).tolist()}
    return results


class _Part(NamedTuple):
    """float32 [n, d] and the labels [n]."""

    vectors: np.ndarray
    labels: np.ndarray

    def rows(self, chosen: np.ndarray) -> _Part:
        return _Part(self.vectors[chosen], self.labels[chosen])

    def and_also(self, other: _Part) -> _Part:
        return _Part(np.concatenate([self.vectors, other.vectors]), np.concatenate([self.labels, other.labels]))


def _vectors(encode: Encode, part: Labelled) -> _Part:
    return _Part(unit(encode(part.texts)).astype(np.float32), np.array(part.labels))


def _cross_validated(given: _Part, dev: _Part | None, seed: int) -> tuple[np.ndarray, float]:
    """Whether each row is named rightly by a regression that has not seen it: bool [n]; and the median strength."""
    folds = np.array_split(np.random.default_rng(seed).permutation(len(given.labels)), FOLDS)
    right = np.empty(len(given.labels), dtype=bool)
    strengths = []
    for number, fold in enumerate(folds):
        others = np.concatenate([rows for other, rows in enumerate(folds) if other != number])
        right[fold], strength = _fitted(given.rows(others), dev, given.rows(fold), seed)
        strengths.append(strength)
    return right, float(np.median(strengths))


def _fitted(train: _Part, dev: _Part | None, test: _Part, seed: int) -> tuple[np.ndarray, float]:
    """Whether each row of `test` is named rightly: bool [n]; and the strength that was best on dev."""
    whole = train if dev is None else train.and_also(dev)
    if dev is None:
        order = np.random.default_rng(seed).permutation(len(train.labels))
        tenth = len(order) // FOLDS
        train, dev = train.rows(order[tenth:]), train.rows(order[:tenth])
    on_dev = [right.mean() for right in _named_rightly(train, dev, STRENGTHS)]
    strength = STRENGTHS[int(np.argmax(on_dev))]  # of equals, the one that fits least closely
    (right,) = _named_rightly(whole, test, [strength])
    return right, strength


def _named_rightly(train: _Part, test: _Part, strengths: Sequence[float]) -> list[np.ndarray]:
    """For each strength, bool [n] of the rows of `test`; each fit begins where the one before it ended."""
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    model = LogisticRegression(max_iter=500, warm_start=True)
    right = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty may not settle: then it is worse on dev
        for strength in strengths:
            model.set_params(C=strength).fit(train.vectors, train.labels)
            right.append(model.predict(test.vectors) == test.labels)
    return right


def _part(folder: Path, split: str) -> Labelled | None:
    path = next((path for end in ("tsv", "tsv.gz") if (path := folder / f"{split}.{end}").is_file()), None)
    if path is None:
        return None
    return _labelled((values for _, values in read_tsv(path, ("label", "text"))), path)


def _hub_part(name: str, split: str) -> Labelled:
    return _labelled(read_rows(name, ("label", "text"), split=split), f"{PREFIX}{name} (split {split})")


def _labelled(rows: Any, where: str | Path) -> Labelled:
    given = [(str(label), text) for label, text in rows]
    if not given:
        raise ValueError(f"{where} has no rows")
    labels, texts = zip(*given, strict=True)
    return Labelled(list(texts), list(labels))
