"""Semantic textual similarity by SimCSE's "all" protocol.

All subsets of a set are joined, and Spearman's correlation between the cosines and the gold scores is taken once over all
pairs. STS13 is without SMT; SICK-R is its test set of 4,927 pairs (not MTEB's 9,927).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from distill.metrics.bootstrap import interval, sample_name
from distill.metrics.quantise import Precision, quantised
from distill.metrics.results import Resampled
from distill.metrics.spearman import bootstrap_spearman, spearman
from distill.metrics.vectors import Encode, EncodedTexts, unit

PAIRS = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STSB": 1379, "SICKR": 4927}
"""The sets of the average in the usual order, each with its number of pairs that have gold."""

SICKR_MTEB = "SICKR-MTEB"
"""SICK-R as MTEB measures it, on 9,927 pairs; not in the average."""

STREAMS = {name: number for number, name in enumerate(PAIRS)} | {SICKR_MTEB: 13}  # of random numbers, for each set's resamples


class Pairs(NamedTuple):
    first: list[str]
    second: list[str]
    gold: np.ndarray  # float64 [n]

    @property
    def texts(self) -> list[str]:
        return [*self.first, *self.second]


def sts_scores(
    encode: Encode,
    sets: Mapping[str, Pairs],
    *,
    precisions: Sequence[Precision] = (),
    calibration: np.ndarray | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman x 100 of every set with 95% percentile intervals: the fields sts, sts_* of ModelResults.

    precisions: vectors that are measured besides float32. calibration: vectors [m, dim] that int8 takes its ranges from; None
    takes those of the sets. bootstrap: number of resamples of the pairs. Missing sets are named in sts_warnings.
    """
    encoded = EncodedTexts.of(encode, chain.from_iterable(pairs.texts for pairs in sets.values()))
    ranges_from = encoded.vectors if calibration is None else calibration
    warnings = [f"{name} is missing: AVG is without it" for name in PAIRS if name not in sets]
    warnings += [
        f"{name} has {len(pairs.gold)} pairs, not the usual {PAIRS[name]}: not comparable with published results"
        for name, pairs in sets.items()
        if len(pairs.gold) != PAIRS.get(name, len(pairs.gold))
    ]
    content = {name: [sets[name].first, sets[name].second, sets[name].gold.tolist()] for name in sets if name in PAIRS}
    sample = sample_name(seed, content)
    results: dict[str, Any] = {"sts_quantised": {}, "sts_resamples": {}, "sts_warnings": warnings}
    for precision in dict.fromkeys(["float32", *precisions]):
        stored = EncodedTexts(encoded.texts, quantised(encoded.vectors, precision, ranges_from))
        scores, resampled = _scores(stored, sets, bootstrap, seed)
        average = Resampled(score=scores["AVG"], sample=sample, values=resampled["AVG"].round(3).tolist())
        if precision == "float32":
            results["sts"] = scores
            results["sts_ci"] = {name: interval(values) for name, values in resampled.items() if bootstrap}
            results["sts_resamples"]["STS AVG"] = average
        else:
            results["sts_quantised"][precision] = scores
            results["sts_resamples"][f"STS AVG {precision}"] = average
    return results


def dev_score(encode: Encode, pairs: Pairs) -> float:
    """Spearman x 100 on one set."""
    return 100 * spearman(_cosines(EncodedTexts.of(encode, pairs.texts), pairs), pairs.gold)


def _scores(
    encode: Encode, sets: Mapping[str, Pairs], bootstrap: int, seed: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The scores of the sets with AVG and AVG_OF, and the resampled scores of the sets and of AVG, [bootstrap] each."""
    scores: dict[str, Any] = {}
    resampled = {}
    for name, pairs in sets.items():
        cosines = _cosines(encode, pairs)
        scores[name] = 100 * spearman(cosines, pairs.gold)
        # depends on nothing else, so that two models are measured on the same resamples
        rng = np.random.default_rng([seed, STREAMS[name]])
        resampled[name] = 100 * bootstrap_spearman(cosines, pairs.gold, bootstrap, rng)
    averaged = [name for name in scores if name in PAIRS]
    resampled["AVG"] = np.mean([resampled[name] for name in averaged], axis=0)
    return scores | {"AVG": float(np.mean([scores[name] for name in averaged])), "AVG_OF": averaged}, resampled


def _cosines(encode: Encode, pairs: Pairs) -> np.ndarray:
    """Cosines [n] of the pairs, float64, from vectors of any length."""
    first, second = (unit(encode(side)) for side in (pairs.first, pairs.second))
    # beyond six decimals there is only float32's noise, which would rank pairs of identical texts among themselves
    return np.einsum("nd,nd->n", first, second).round(6)
