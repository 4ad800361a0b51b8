"""Any sentence-transformers model as a function from sentences to vectors, and how fast it is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

from distill.models import resolve_model

Encode = Callable[[list[str]], np.ndarray]
"""Sentences [n] to their vectors, float32 [n, d], in the same order; not necessarily normalised."""


class Encoder:
    """A loaded model as an Encode.

    dim     width of its vectors, after `truncate_dim`
    params  number of its parameters
    """

    def __init__(self, model: SentenceTransformer, *, batch_size: int = 64, progress: bool = False) -> None:
        self.model = model
        self.batch_size = batch_size
        self.progress = progress
        self.params = sum(parameter.numel() for parameter in model.parameters())
        self.dim = int(self._encode(["width"]).shape[1])

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """Vectors float32 [n, dim] in the order given; a sentence that comes twice is encoded once.

        Raises ValueError if the model gives a number that is not finite.
        """
        row_of = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentences))}
        if not row_of:
            return np.empty((0, self.dim), np.float32)
        vectors = self._encode(list(row_of), self.progress)
        if not np.isfinite(vectors).all():
            bad = list(row_of)[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
            raise ValueError(f"the model gives a vector that is not finite, first for {bad!r}")
        return vectors[[row_of[sentence] for sentence in sentences]]

    def _encode(self, sentences: list[str], progress: bool = False) -> np.ndarray:
        # sentence-transformers itself batches by length, longest first, and restores the order
        vectors = self.model.encode(sentences, batch_size=self.batch_size, show_progress_bar=progress, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)


def encoder_of(
    path_or_name: str | Path,
    *,
    batch_size: int = 64,
    device: str | None = None,
    truncate_dim: int | None = None,
    progress: bool = False,
) -> Encoder:
    """Loads a folder, `package:NAME/FOLDER` or, where there is no such folder, a hub name; safetensors only, no remote code.

    device None takes the GPU where there is one. truncate_dim keeps the first so many dimensions of every vector.
    Raises ValueError that says what is missing, before anything is loaded where that can be known.
    """
    name = resolve_model(str(path_or_name))
    if truncate_dim is not None and truncate_dim < 1:
        raise ValueError(f"truncate_dim {truncate_dim} is not a number of dimensions; it must be 1 or more")
    _check_device(device)
    options: dict[str, Any] = {"device": device, "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    model = _load_folder(name, options) if Path(name).is_dir() else _load_from_hub(name, options)
    width = model.get_embedding_dimension()
    if truncate_dim is not None and width is not None and truncate_dim > width:
        raise ValueError(f"truncate_dim {truncate_dim} is more than the {width} dimensions of {path_or_name}")
    model.truncate_dim = truncate_dim
    return Encoder(model, batch_size=batch_size, progress=progress)


def throughput(encode: Encode, sentences: Sequence[str], seconds: float = 3.0) -> float:
    """Sentences a second, over distinct sentences in slices of 256, for at least `seconds` after one warm-up slice."""
    distinct = list(dict.fromkeys(sentences))
    if not distinct:
        raise ValueError("throughput needs at least one sentence")
    slices = [distinct[start : start + 256] for start in range(0, len(distinct), 256)]
    encode(slices[0])
    num_encoded, start = 0, time.perf_counter()
    for part in itertools.cycle(slices):
        encode(part)
        num_encoded += len(part)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    return num_encoded / elapsed


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [n, d] of any float type, L2-normalised in float64; a row of zeros stays one."""
    rows = vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _check_device(device: str | None) -> None:
    try:
        kind = torch.device(device).type if device else "cpu"
    except RuntimeError:
        raise ValueError(f"{device!r} is not a device; name cpu, cuda, cuda:1, ... or none for the default") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} is asked for, but there is no GPU that this torch can use")


def _load_folder(folder: str, options: dict[str, Any]) -> SentenceTransformer:
    try:
        return SentenceTransformer(folder, local_files_only=True, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the model at {folder} does not load: {error}") from None


def _load_from_hub(name: str, options: dict[str, Any]) -> SentenceTransformer:
    reachable = _hub_answers()
    try:
        return SentenceTransformer(name, local_files_only=not reachable, **options)
    except OSError as error:
        why = (
            "the hub has no such model that loads"
            if reachable
            else "the hub cannot be reached, and its cache here has no such model"
        )
        detail = f": {str(error).splitlines()[0]}" if reachable and str(error) else ""
        raise ValueError(f"no model {name}: there is no such folder, and {why}{detail}") from None


def _hub_answers() -> bool:
    """One short try, where the library's own retries would take more than a minute to say that there is no network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the hub's client may be requests, httpx or httpx2, and has no common error
        return False
    return True
