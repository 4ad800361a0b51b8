"""All sets that models are measured on: read once, encoded once for each model, measured at each of its sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from distill.corpus.evaluation_sets import (
    RetrievalSet,
    TransferSet,
    read_retrieval,
    read_sts,
    read_transfer,
    set_name,
)
from distill.evaluation.index_types import Search, import_faiss, index_types
from distill.evaluation.retrieval import retrieval_scores
from distill.evaluation.transfer import check_labels, transfer_scores
from distill.metrics.quantise import Precision
from distill.metrics.sts import Pairs, sts_scores
from distill.metrics.vectors import RoleEncode, RoleText
from distill.run.files import fingerprint
from distill.run.prompts import Role

Set = TypeVar("Set")


class Tasks(NamedTuple):
    """precisions: of vectors that STS and retrieval are also measured with. searches, rescore: see index_types."""

    sts: dict[str, Pairs]
    retrieval: dict[str, RetrievalSet]
    transfer: dict[str, TransferSet]
    searches: tuple[Search, ...] = ()
    precisions: tuple[Precision, ...] = ()
    rescore: int | None = None

    @property
    def texts(self) -> list[RoleText]:
        """Every text of every set, once for each role that it is encoded for."""
        parts: list[tuple[Role | None, Iterable[str]]] = [(None, pairs.texts) for pairs in self.sts.values()]
        for found in self.retrieval.values():
            parts += [("query", found.queries.values()), ("document", found.documents.values())]
        parts += [(None, labelled.texts) for labelled in self.transfer.values()]
        return list(dict.fromkeys((role, text) for role, texts in parts for text in texts))

    @property
    def fingerprint(self) -> str:
        """Equal for equal sets and options."""
        sts = {name: [pairs.first, pairs.second, pairs.gold.tolist()] for name, pairs in self.sts.items()}
        content = [sts, self.retrieval, self.transfer, self.searches, self.precisions, self.rescore]
        return fingerprint({"tasks": content})

    def measure(
        self, encode: RoleEncode, *, calibration: np.ndarray | None = None, bootstrap: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """The fields of ModelResults of these sets. calibration: vectors [m, dim] that int8 STS takes its ranges from."""
        options: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
        results: dict[str, Any] = {}
        if self.sts:
            results |= sts_scores(encode, self.sts, precisions=self.precisions, calibration=calibration, **options)
        if self.retrieval:
            types = index_types(self.searches, self.precisions, self.rescore)
            results |= retrieval_scores(encode, self.retrieval, types=types, **options)
        if self.transfer:
            results |= transfer_scores(encode, self.transfer, **options)
        return results


def read_tasks(
    sts: str | None = None,
    retrieval: Sequence[str] = (),
    transfer: Sequence[str] = (),
    *,
    searches: Sequence[Search] = (),
    precisions: Sequence[Precision] = (),
    rescore: int | None = None,
    seed: int = 0,
) -> Tasks:
    """Reads folders, hub:OWNER/NAME, and for STS hub. seed: that `Tasks.measure` will be called with.

    Raises ValueError for what is missing, malformed, named twice or cannot be measured.
    """
    if index_types(searches, precisions, rescore) and retrieval:
        import_faiss()
    return Tasks(
        read_sts(sts) if sts is not None else {},
        _by_name(retrieval, read_retrieval),
        _by_name(transfer, partial(read_measurable, seed=seed)),
        tuple(searches),
        tuple(precisions),
        rescore,
    )


def read_measurable(where: str, seed: int = 0) -> TransferSet:
    """A classification set. Raises ValueError where a regression cannot be fitted on it (`check_labels`)."""
    given = read_transfer(where)
    check_labels(where, given, seed)
    return given


def set_names(places: Sequence[str]) -> list[str]:
    """The names of sets in results. Raises ValueError if two have the same one."""
    names = [set_name(place) for place in places]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sets are called {name}; results are kept by the name of the folder or dataset")
    return names


def _by_name(places: Sequence[str], read: Callable[[str], Set]) -> dict[str, Set]:
    return {name: read(place) for name, place in zip(set_names(places), places, strict=True)}
