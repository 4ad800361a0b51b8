"""Two results beside each other: which differences are more than chance, on the same resamples of the same sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.evaluation.bootstrap import difference


class Measured(NamedTuple):
    score: float
    resamples: list[float]
    of: str


def read_results(where: str) -> tuple[str, dict[str, Any]]:
    """The name and the results of FILE.json, or of one model of a run's, FILE.json:MODEL.

    Raises ValueError if they are not there, or if it takes a model's name to say which are meant.
    """
    path, _, model = where.rpartition(":") if ":" in where and not Path(where).is_file() else (where, "", "")
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the results {path}: {error}") from None
    models = [name for name, value in results.items() if isinstance(value, dict) and "dim" in value]
    if not model and models:
        raise ValueError(f"{path} holds several models ({', '.join(models)}); name one, e.g. {path}:{models[0]}")
    if model and model not in models:
        raise ValueError(f"{path} has no model {model}; it has {', '.join(models) or 'one without a name'}")
    return model or Path(path).stem, results[model] if model else results


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str] = ("first", "second")
) -> list[dict[str, Any]]:
    """Of each measure that both results have: {"measure", "first", "second", "difference", "interval", "verdict"}.

    difference is second - first, interval the 95% of it; both are missing where the two were not measured on the same
    resamples, and the verdict says so. `names` are what it calls the two. Raises ValueError if they have nothing in common.
    """
    theirs = dict(_measured(second))
    rows = []
    for measure, one in _measured(first):
        if measure not in theirs:
            continue
        other = theirs[measure]
        row: dict[str, Any] = {"measure": measure, "first": one.score, "second": other.score}
        if one.of == other.of and len(one.resamples) == len(other.resamples) > 0:
            low, high = difference(one.resamples, other.resamples)
            verdict = "not distinguishable from 0" if low <= 0 <= high else f"{names[low > 0]} is better"
            row |= {"difference": other.score - one.score, "interval": [low, high]}
        else:
            verdict = "not comparable: other data, seed or --bootstrap"
        rows.append(row | {"verdict": verdict})
    if not rows:
        raise ValueError("the two results have no measure in common that resamples were kept of")
    return rows


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[str, Measured]]:
    """Every score that resamples were kept of, by a name for people."""
    if "sts_resamples" in results:
        kept = results["sts_resamples"]
        yield "STS AVG", Measured(results["sts"]["AVG"], kept["AVG"], kept["of"])
    for task in ("retrieval", "transfer"):
        for name, kept in results.get(f"{task}_resamples", {}).items():
            yield from _of_set(name, results[task][name], kept, kept["of"])


def _of_set(name: str, scores: Mapping[str, Any], kept: Mapping[str, Any], of: str) -> Iterator[tuple[str, Measured]]:
    for key, values in kept.items():
        if isinstance(values, list):
            yield f"{name} {key}", Measured(scores[key], values, of)
        elif isinstance(values, dict):
            yield from _of_set(f"{name} {key}", scores[key], values, of)
