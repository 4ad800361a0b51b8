"""The config sections `evaluate` and `search`."""

from __future__ import annotations

from typing import Literal

from distill.run.config import FileName, Section, result, speed


class EvaluateConfig(Section):
    """What the table measures; also what training measures on the way."""

    sts: FileName | None = result(None, description="a folder with sts12_test.tsv.gz ...; hub; null evaluates fidelity alone")
    retrieval: list[FileName] | None = result(None, description="folders in BEIR's layout, or hub:OWNER/NAME")
    precision: list[Literal["float32", "float16", "int8", "binary"]] | None = result(
        None, description="quantised vectors that STS and retrieval are also measured with, retrieval through faiss"
    )
    rescore: int | None = result(None, gt=0, description="re-rank by larger vectors: the multiple of the candidates to re-rank")
    transfer: list[FileName] | None = result(None, description="folders with train.tsv and test.tsv, or hub:OWNER/NAME")
    baselines: bool = result(
        False, description="also measure the student before training, and the PCA of what hpd compresses, at hpd's sizes"
    )
    num_held_out: int = result(
        2000, gt=2, description="held-out texts that fidelity is measured on, or what dev_sentences leaves"
    )
    dev_sentences: int = result(1000, gt=2, description="held-out texts of a dev evaluation in training, at most half of all")
    batch_size: int = speed(64, gt=0, description="texts in one forward pass of an evaluation")


class SearchConfig(Section):
    """The index that the evaluate stage leaves for launcher/search.py."""

    max_sentences: int = result(200_000, gt=0, description="texts that launcher/search.py answers from")
