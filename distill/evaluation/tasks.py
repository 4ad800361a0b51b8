"""Everything that a model is to be measured on: read once, encoded once, measured for as many sizes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from distill.evaluation.beir import RetrievalSet, read_retrieval
from distill.evaluation.encode import Encode
from distill.evaluation.hub import set_name
from distill.evaluation.index import Form, import_faiss
from distill.evaluation.retrieval import retrieval_scores
from distill.evaluation.sts import Pairs, read_sets, sts_scores
from distill.evaluation.transfer import TransferSet, read_transfer, transfer_scores

Set = TypeVar("Set")


class Tasks(NamedTuple):
    sts: dict[str, Pairs]
    retrieval: dict[str, RetrievalSet]
    transfer: dict[str, TransferSet]
    forms: tuple[Form, ...]

    @property
    def sentences(self) -> list[str]:
        """Every text of every set, once."""
        return list(dict.fromkeys(text for texts in self._texts() for text in texts))

    def _texts(self) -> Iterable[Iterable[str]]:
        for pairs in self.sts.values():
            yield from (pairs.first, pairs.second)
        for found in self.retrieval.values():
            yield from (found.queries.values(), found.documents.values())
        for labelled in self.transfer.values():
            yield labelled.texts

    def measure(self, encode: Encode, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
        """What results.json says of these sets: the keys of sts_scores, retrieval_scores and transfer_scores."""
        results: dict[str, Any] = {}
        if self.sts:
            results |= sts_scores(encode, self.sts, bootstrap=bootstrap, seed=seed)
        if self.retrieval:
            results |= retrieval_scores(encode, self.retrieval, forms=self.forms, bootstrap=bootstrap, seed=seed)
        if self.transfer:
            results |= transfer_scores(encode, self.transfer, bootstrap=bootstrap, seed=seed)
        return results


class Encoded:
    """Vectors [n, d] of n sentences as an Encode of these sentences."""

    def __init__(self, sentences: Sequence[str], vectors: np.ndarray) -> None:
        self._row_of = {sentence: row for row, sentence in enumerate(sentences)}
        self._vectors = vectors

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        return self._vectors[[self._row_of[sentence] for sentence in sentences]]

    def truncated(self, dim: int) -> Encode:
        """The first `dim` dimensions of every vector."""
        return lambda sentences: self(sentences)[:, :dim]


def read_tasks(
    sts: str | None = None,
    retrieval: Sequence[str] = (),
    transfer: Sequence[str] = (),
    forms: tuple[Form, ...] = (),
) -> Tasks:
    """Reads folders, hub:OWNER/NAME, and for STS hub. Raises ValueError for what is missing, malformed or named twice."""
    if forms:
        import_faiss()
    return Tasks(
        read_sets(sts) if sts is not None else {},
        _named(retrieval, read_retrieval),
        _named(transfer, read_transfer),
        forms,
    )


def _named(places: Sequence[str], read: Callable[[str], Set]) -> dict[str, Set]:
    names = [set_name(place) for place in places]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sets are called {name}; results are kept by the name of the folder or dataset")
    return {name: read(place) for name, place in zip(names, places, strict=True)}
