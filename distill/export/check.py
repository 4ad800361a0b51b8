"""Verifies exported files against the student: their vectors of the same texts must agree with its own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from distill.export.formats import FORMATS

BATCH_SIZES = (1, 32)  # of onnxruntime: alone, and beside texts of other lengths


class Agreement(NamedTuple):
    """Cosines to the student's vectors: the lowest, the index of its text, and the mean."""

    worst: float
    text: int
    mean: float


def check_format(folder: Path, name: str, student: str, texts: Sequence[str], expected_nd: np.ndarray) -> Agreement:
    """Verifies the format `name` of an exported folder against the student's own vectors [n, dim], which are L2-normalised.

    Raises ValueError with the worst cosine and its text's index if that is below what the format must reach.
    """
    agreements = [agreement(found_nd, expected_nd) for found_nd in _vectors(folder, name, texts)]
    worst, text, _ = min(agreements, key=lambda each: -np.inf if np.isnan(each.worst) else each.worst)
    mean = float(np.mean([each.mean for each in agreements]))
    if not worst >= FORMATS[name].lowest:
        raise ValueError(
            f"the export of {student} as {name} does not agree with the student: worst cosine {worst:.5f}, of text"
            f" {text} of {len(texts)}; mean {mean:.5f}; {FORMATS[name].lowest} is needed"
        )
    return Agreement(worst, text, mean)


def agreement(found_nd: np.ndarray, expected_nd: np.ndarray) -> Agreement:
    """Of two sets of vectors that should be equal and of length 1. NaN anywhere is the worst.

    The cosine is 1 - |f - e|^2 / 2, which is lower still where a length is not 1.
    """
    assert found_nd.shape == expected_nd.shape, (found_nd.shape, expected_nd.shape)
    cosines = 1 - np.square(found_nd.astype(np.float64) - expected_nd).sum(axis=1) / 2
    text = int(cosines.argmin())
    return Agreement(float(cosines[text]), text, float(cosines.mean()))


def _vectors(folder: Path, name: str, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """[n, dim] for each way to compute them."""
    if name == "sentence-transformers":
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
        yield model.encode(list(texts), show_progress_bar=False)
        return
    for batch_size in BATCH_SIZES:
        yield onnx_vectors(folder, FORMATS[name].file, texts, batch_size)


def onnx_vectors(folder: Path, file: str, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Vectors [n, dim] float32 of texts by onnxruntime, from the graph `file` and tokenizer.json."""
    from tokenizers import Tokenizer

    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer.encode_batch(list(texts[start : start + batch_size]))
        tokens = {
            "input_ids": np.array([each.ids for each in batch], dtype=np.int64),
            "attention_mask": np.array([each.attention_mask for each in batch], dtype=np.int64),
        }
        vectors.append(session.run(None, tokens)[0])
    return np.concatenate(vectors)
