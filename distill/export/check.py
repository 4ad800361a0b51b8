"""What was written, held against the student it was written from: vectors of the same sentences, from the files on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from distill.export.formats import FORMATS, package

BATCH_SIZES = (1, 32)  # of onnxruntime: alone, and beside sentences of other lengths


class Agreement(NamedTuple):
    """Of cosines to the student's vectors: the lowest, whose sentence that is, and the mean."""

    worst: float
    sentence: int
    mean: float


def check_format(folder: Path, name: str, student: str, sentences: Sequence[str], expected_nd: np.ndarray) -> Agreement:
    """Holds the format `name` of an exported folder against the student's own vectors [n, dim], which are L2-normalised.

    Raises ValueError with the worst cosine and its sentence's index if that is below what the format must reach.
    """
    agreements = [agreement(found_nd, expected_nd) for found_nd in _vectors(folder, name, sentences)]
    worst, sentence, _ = min(agreements, key=lambda each: -np.inf if np.isnan(each.worst) else each.worst)
    mean = float(np.mean([each.mean for each in agreements]))
    if not worst >= FORMATS[name].lowest:
        raise ValueError(
            f"the export of {student} as {name} does not agree with the student: worst cosine {worst:.5f}, of sentence"
            f" {sentence} of {len(sentences)}; mean {mean:.5f}; {FORMATS[name].lowest} is needed"
        )
    return Agreement(worst, sentence, mean)


def agreement(found_nd: np.ndarray, expected_nd: np.ndarray) -> Agreement:
    """Of two sets of vectors that should be the same and of length 1. NaN anywhere is the worst.

    The cosine is 1 - |f - e|^2 / 2, which is lower still where a length is not 1.
    """
    assert found_nd.shape == expected_nd.shape, (found_nd.shape, expected_nd.shape)
    cosines = 1 - np.square(found_nd.astype(np.float64) - expected_nd).sum(axis=1) / 2
    sentence = int(cosines.argmin())
    return Agreement(float(cosines[sentence]), sentence, float(cosines.mean()))


def _vectors(folder: Path, name: str, sentences: Sequence[str]) -> Iterator[np.ndarray]:
    """[n, dim] each, in every way that they are to be had."""
    if name == "sentence-transformers":
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
        yield model.encode(list(sentences), show_progress_bar=False)
        return
    for batch_size in BATCH_SIZES:
        yield onnx_vectors(folder, FORMATS[name].file, sentences, batch_size)


def onnx_vectors(folder: Path, file: str, sentences: Sequence[str], batch_size: int) -> np.ndarray:
    """Vectors [n, dim] float32 of sentences as others get them: by onnxruntime from the graph `file` and tokenizer.json."""
    from tokenizers import Tokenizer

    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = []
    for start in range(0, len(sentences), batch_size):
        batch = tokenizer.encode_batch(list(sentences[start : start + batch_size]))
        tokens = {
            "input_ids": np.array([each.ids for each in batch], dtype=np.int64),
            "attention_mask": np.array([each.attention_mask for each in batch], dtype=np.int64),
        }
        vectors.append(session.run(None, tokens)[0])
    return np.concatenate(vectors)
