"""Two models' results side by side: which differences are more than chance, on the same resamples of the same sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distill.metrics.bootstrap import paired_difference
from distill.metrics.results import Interval, ModelResults, read_results


class Difference(NamedTuple):
    """difference: second - first, with its 95% interval; both None where the resamples are not the same."""

    measure: str
    first: float
    second: float
    difference: float | None
    interval: Interval | None
    verdict: str


def read_model(where: str) -> tuple[str, ModelResults]:
    """The name and the results of FILE.json, or of one of several models, FILE.json:MODEL.

    Raises ValueError if they are not there, or if a model's name is needed to say which.
    """
    path, _, model = where.rpartition(":") if ":" in where and not Path(where).is_file() else (where, "", "")
    models = read_results(Path(path))
    if not model and len(models) != 1:
        raise ValueError(f"{path} holds several models ({', '.join(models)}); name one, e.g. {path}:{next(iter(models), '')}")
    if model and model not in models:
        raise ValueError(f"{path} has no model {model}; it has {', '.join(models)}")
    return (model, models[model]) if model else next(iter(models.items()))


def compare(first: ModelResults, second: ModelResults, names: tuple[str, str] = ("first", "second")) -> list[Difference]:
    """Of each measure that both results have resamples of; `names` are those in the verdicts.

    Raises ValueError if they have nothing in common.
    """
    found = []
    for measure, one in first.resamples.items():
        if (other := second.resamples.get(measure)) is None:
            continue
        if (within := paired_difference(one, other)) is None:
            verdict = "not comparable: other data, seed or --bootstrap"
        elif within[0] <= 0 <= within[1]:
            verdict = "not distinguishable from 0"
        else:
            verdict = f"{names[within[0] > 0]} is better"
        change = None if within is None else other.score - one.score
        found.append(Difference(measure, one.score, other.score, change, within, verdict))
    if not found:
        raise ValueError("the two results have no measure in common that resamples were kept of")
    return found
