"""Transfer as in SentEval: the accuracy of a logistic regression on frozen vectors.

The inverse L2 strength C is chosen on the dev set, where there is one, else on a random tenth of train; the regression is then
fitted on all of train and dev. Without a test set, the accuracy is that of 10-fold cross-validation over train, with a C for
each fold. Vectors are L2-normalised, so that a model's scale is not mistaken for its quality; the values
of C are SentEval's range for vectors of that length.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import KFold, PredefinedSplit, ShuffleSplit

from distill.corpus.evaluation_sets import Labelled, TransferSet, part_name
from distill.metrics.bootstrap import interval, resampled_means, sample_name
from distill.metrics.results import Resampled
from distill.metrics.vectors import Encode, unit_float32

STRENGTHS = tuple(4.0**power for power in range(6))
FOLDS = 10


def transfer_scores(encode: Encode, sets: Mapping[str, TransferSet], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The accuracy on each set, in 0..1, with a 95% interval from `bootstrap` resamples of the test texts.

    The fields transfer, transfer_* of ModelResults. majority is the accuracy of always predicting the most frequent label; C
    is the median over folds where there is no test set, and `test` then counts train.
    """
    results: dict[str, Any] = {"transfer": {}, "transfer_ci": {}, "transfer_resamples": {}}
    for name, given in sets.items():
        tested = given.test or given.train
        correct, strength = _correct(encode, given, seed)
        sample = sample_name(seed, {"texts": tested.texts, "labels": tested.labels})
        (accuracies,) = resampled_means([correct.astype(np.float64)], sample, bootstrap)
        _, counts = np.unique(tested.labels, return_counts=True)
        accuracy = float(correct.mean())
        results["transfer"][name] = {
            "accuracy": accuracy,
            "majority": float(counts.max() / counts.sum()),
            "labels": len(set(given.train.labels)),
            "train": len(given.train.labels),
            "test": len(tested.labels),
            "C": strength,
        }
        results["transfer_ci"][name] = {"accuracy": interval(accuracies)} if bootstrap else {}
        resampled = Resampled(score=accuracy, sample=sample, values=accuracies.round(5).tolist())
        results["transfer_resamples"][f"{name} accuracy"] = resampled
    return results


def check_labels(where: str, given: TransferSet, seed: int = 0) -> None:
    """Raises ValueError if a regression of `transfer_scores` would be fitted on no row of one of the labels it is tested on."""
    if given.test is not None:
        return
    labels, labels_of_dev = np.array(given.train.labels), given.dev.labels if given.dev is not None else []
    for rows, fold in _folds(len(labels), seed):
        if alone := set(labels[fold].tolist()) - set(labels[rows].tolist()) - set(labels_of_dev):
            label = min(alone)
            raise ValueError(
                f"{part_name(where, 'train')}: without a test set, {where} is measured by {FOLDS}-fold cross-validation, and"
                f" all rows of label {label!r} ({int((labels == label).sum())}) are in one fold: add rows of it, leave it out,"
                " or add a test set"
            )


def _folds(num_rows: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows outside and inside of each fold."""
    yield from KFold(FOLDS, shuffle=True, random_state=seed).split(np.arange(num_rows))


def _correct(encode: Encode, given: TransferSet, seed: int) -> tuple[np.ndarray, float]:
    """Whether each test row is predicted correctly by a regression that was not fitted on it, bool [n]; and C."""
    x, y = _arrays(encode, given.train)
    num_train = len(y)
    if given.dev is not None:
        dev_x, dev_y = _arrays(encode, given.dev)
        x, y = np.concatenate([x, dev_x]), np.concatenate([y, dev_y])
    if given.test is not None:
        test_x, test_y = _arrays(encode, given.test)
        model, strength = _fit(x, y, num_train, seed)
        return model.predict(test_x) == test_y, strength
    correct = np.empty(num_train, dtype=bool)
    strengths = []
    for rows, fold in _folds(num_train, seed):
        kept = np.concatenate([rows, np.arange(num_train, len(y))])
        model, strength = _fit(x[kept], y[kept], len(rows), seed)
        correct[fold] = model.predict(x[fold]) == y[fold]
        strengths.append(strength)
    return correct, float(np.median(strengths))


def _fit(x: np.ndarray, y: np.ndarray, num_train: int, seed: int) -> tuple[LogisticRegressionCV, float]:
    """Fitted on all rows with the C that is best on the rows from num_train on, the dev set; if there are none, on a tenth."""
    is_dev = np.arange(len(y)) >= num_train
    if is_dev.any():
        split = PredefinedSplit(np.where(is_dev, 0, -1))
    else:
        split = ShuffleSplit(1, test_size=1 / FOLDS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where a weak penalty does not converge, another C is better
        warnings.simplefilter("ignore", FutureWarning)  # of attributes that are not used here
        model = LogisticRegressionCV(Cs=STRENGTHS, cv=split, scoring="accuracy", max_iter=500).fit(x, y)
    return model, float(np.ravel(model.C_)[0])


def _arrays(encode: Encode, part: Labelled) -> tuple[np.ndarray, np.ndarray]:
    return unit_float32(encode(part.texts)), np.array(part.labels)
