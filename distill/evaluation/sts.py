"""Semantic textual similarity by SimCSE's "all" protocol.

All subsets of a set are put together, and Spearman's correlation between the cosines and the gold scores is taken once
over all pairs; pairs with no gold are dropped. STS13 is without SMT; SICK-R is its test set of 4,927 pairs (not MTEB's 9,927).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.evaluation.bootstrap import identity, interval
from distill.evaluation.encode import Encode, unit
from distill.evaluation.hub import read_rows
from distill.evaluation.rank import bootstrap_spearman, spearman
from distill.evaluation.tsv import read_tsv

PAIRS = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STSB": 1379, "SICKR": 4927}
"""The sets in the usual order, each with its number of pairs that have gold."""

HUB = {name: f"mteb/{name.lower()}-sts" for name in ("STS12", "STS13", "STS14", "STS15", "STS16")} | {
    "STSB": "mteb/stsbenchmark-sts",
    "SICKR-MTEB": "mteb/sickr-sts",
}
"""The sets' names on the Hugging Face hub, each with the columns sentence1, sentence2 and score. SICK-R is there only as
MTEB measures it, on all 9,927 pairs; it goes under a name of its own and not into the average."""


class Pairs(NamedTuple):
    first: list[str]
    second: list[str]
    gold: np.ndarray  # float64 [n]


def read_sets(where: str | Path) -> dict[str, Pairs]:
    """The sets of a folder, or those of the hub for "hub", in the usual order. Raises ValueError where one cannot be read."""
    if str(where) == "hub":
        return {name: read_hub(name, "test") for name in HUB}
    return {name: read_pairs(path) for name, path in sts_files(where).items()}


def read_hub(name: str, split: str) -> Pairs:
    """The pairs with gold of a set of HUB. Raises ValueError if it cannot be fetched."""
    rows = read_rows(HUB[name], ("sentence1", "sentence2", "score"), split=split)
    return _pairs(rows, f"the Hugging Face dataset {HUB[name]} (split {split})")


def read_dev(where: str | Path) -> Pairs | None:
    """STS-B's dev set; None if `where` is a folder without stsb_dev.tsv.gz."""
    if str(where) == "hub":
        return read_hub("STSB", "validation")
    path = Path(where) / "stsb_dev.tsv.gz"
    return read_pairs(path) if path.is_file() else None


def sts_files(folder: str | Path) -> dict[str, Path]:
    """The sets that `folder` holds, in the usual order. Raises ValueError if it holds none."""
    named = {name: Path(folder) / f"{name.lower()}_test.tsv.gz" for name in PAIRS}
    files = {name: path for name, path in named.items() if path.is_file()}
    if not files:
        what = "it has none of" if Path(folder).is_dir() else "there is no such folder; it should hold"
        raise ValueError(f"no STS sets in {folder}: {what} {', '.join(path.name for path in named.values())}")
    return files


def sts_scores(encode: Encode, sets: dict[str, Pairs], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Spearman x 100 of every set, with 95% percentile intervals from `bootstrap` resamples of the pairs.

    {"sts": {"STS12": 72.37, ..., "AVG": .., "AVG_OF": ["STS12", ..]}, "sts_ci": {"STS12": [low, high], ..., "AVG": [..]},
     "sts_resamples": {"AVG": [..], "of": ..}, "sts_warnings": [..]}. A missing set is in none of them but the warnings; AVG is
    the plain mean of AVG_OF, which are those of PAIRS that were measured. Two models' resampled AVG are of the same resamples
    if `of` is equal: compare.py takes their difference.
    """
    warnings = [f"{name} is missing: AVG is without it" for name in PAIRS if name not in sets]
    warnings += [
        f"{name} has {len(pairs.gold)} pairs, not the usual {PAIRS[name]}: not comparable with published figures"
        for name, pairs in sets.items()
        if name in PAIRS and len(pairs.gold) != PAIRS[name]
    ]
    scores: dict[str, Any] = {}
    resampled = {}
    for name, cosine in _cosines(encode, sets).items():
        gold = sets[name].gold
        scores[name] = 100 * spearman(cosine, gold)
        # the resamples of a set depend on nothing else, so two models are measured on the same ones
        rng = np.random.default_rng([seed, [*PAIRS, *HUB].index(name)])
        resampled[name] = 100 * bootstrap_spearman(cosine, gold, bootstrap, rng)
    averaged = [name for name in scores if name in PAIRS]
    resampled["AVG"] = np.mean([resampled[name] for name in averaged], axis=0)
    average = {"AVG": float(np.mean([scores[name] for name in averaged])), "AVG_OF": averaged}
    content = {name: [sets[name].first, sets[name].second, sets[name].gold.tolist()] for name in averaged}
    return {
        "sts": scores | average,
        "sts_ci": {name: interval(values) for name, values in resampled.items() if bootstrap},
        "sts_resamples": {"AVG": resampled["AVG"].round(3).tolist(), "of": identity(seed, content)},
        "sts_warnings": warnings,
    }


def dev_score(encode: Encode, pairs: Pairs) -> float:
    """Spearman x 100 on one set."""
    return 100 * spearman(_cosines(encode, {"dev": pairs})["dev"], pairs.gold)


def read_pairs(path: Path) -> Pairs:
    """The pairs with gold of a gzipped TSV with the columns score, sentence1 and sentence2 (others are ignored)."""
    return _pairs(_rows(path), path)


def _pairs(rows: Iterable[tuple[str, str, float | None]], where: str | Path) -> Pairs:
    scored = [row for row in rows if row[2] is not None and math.isfinite(row[2])]
    if len(scored) < 2:
        raise ValueError(f"{where} has {len(scored)} pairs with a gold score; a correlation needs 2 or more")
    first, second, gold = zip(*scored, strict=True)
    return Pairs(list(first), list(second), np.array(gold))


def _rows(path: Path) -> Iterator[tuple[str, str, float]]:
    for where, (score, first, second) in read_tsv(path, ("score", "sentence1", "sentence2")):
        if not score.strip():
            continue
        try:
            yield first, second, float(score)
        except ValueError:
            raise ValueError(f"{where}: the score {score!r} is not a number") from None


def _cosines(encode: Encode, sets: dict[str, Pairs]) -> dict[str, np.ndarray]:
    """Cosines [n] of each set's pairs, float64 of six decimals; every sentence of all sets is encoded once."""
    sentences = dict.fromkeys(text for pairs in sets.values() for side in (pairs.first, pairs.second) for text in side)
    row_of = {text: row for row, text in enumerate(sentences)}
    vectors = unit(encode(list(row_of)))
    cosines = {}
    for name, pairs in sets.items():
        first, second = (vectors[[row_of[text] for text in side]] for side in (pairs.first, pairs.second))
        # beyond six decimals there is only float32's noise, which would rank pairs of identical sentences among themselves
        cosines[name] = np.einsum("nd,nd->n", first, second).round(6)
    return cosines
