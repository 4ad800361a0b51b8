"""Texts as token ids, cut into batches by a budget of padded tokens, with few distinct shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

BLOCK = 4096  # texts tokenised in one call
SAMPLE = 32  # texts on which direct tokenizing is compared with the model's preprocessing
DIRECT = {"input_ids": "ids", "token_type_ids": "type_ids"}  # feature -> attribute of tokenizers.Encoding


class Tokens(NamedTuple):
    """Features of n texts, concatenated: `flat[name]` int32 [total tokens], text i at starts[i] : starts[i + 1]."""

    flat: dict[str, np.ndarray]
    starts: np.ndarray  # int64 [n + 1]
    shared: dict[str, Any]  # features of all texts together: modality, prompt length

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


class Batch(NamedTuple):
    rows: np.ndarray  # int64, indices of texts
    width: int  # tokens that each is padded to


def can_tokenise(model: SentenceTransformer) -> bool:
    """Whether a model takes token ids that can be padded here; others (static embeddings, bags of words) take texts."""
    return isinstance(model[0], Transformer) and set(model.modalities) == {"text"} and model.tokenizer is not None


def tokenise(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> Tokens:
    """The features of the model's own preprocessing, truncated to its max_seq_length, without padding.

    The preprocessing spends two thirds of its time in Python: if its tokenizer alone gives the same for a sample, the tokenizer
    is called directly.
    """
    ragged = {"text": {"padding": False, "return_attention_mask": False}, "common": {"return_tensors": None}}

    def preprocess(block: list[str]) -> dict[str, Any]:
        return dict(model.preprocess(block, prompt=prompt or None, processing_kwargs=ragged))

    def direct(block: list[str]) -> dict[str, Any]:
        encodings = model.tokenizer.backend_tokenizer.encode_batch_fast([prompt + text for text in block])
        return {name: [getattr(encoding, DIRECT[name]) for encoding in encodings] for name in names}

    sample = list(texts[:SAMPLE])
    features = preprocess(sample)  # which also leaves the tokenizer set to truncate and not to pad
    shared = {name: value for name, value in features.items() if not isinstance(value, list)}
    names = [name for name in features if name not in shared]
    may_be_direct = model.tokenizer.is_fast and DIRECT.keys() >= set(names)
    same = may_be_direct and all(direct(sample)[name] == features[name] for name in names)
    if same and "token_type_ids" in names and not any(map(any, features["token_type_ids"])):
        names.remove("token_type_ids")  # zeros are an encoder's default
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    lengths: list[int] = []
    for start in range(0, len(texts), BLOCK):
        block = list(texts[start : start + BLOCK])
        features = direct(block) if same else preprocess(block)
        for name in names:
            parts[name].append(np.fromiter(chain.from_iterable(features[name]), np.int32))
        lengths += map(len, features["input_ids"])
    return Tokens({name: np.concatenate(part) for name, part in parts.items()}, np.cumsum([0, *lengths]), shared)


def pad(model: SentenceTransformer, tokens: Tokens, batch: Batch) -> dict[str, Any]:
    """The features of a batch, int64 [rows, width], padded on the tokenizer's side."""
    tokenizer = model.tokenizer
    filler = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    lengths = tokens.lengths[batch.rows]
    columns = np.arange(batch.width)
    real = columns >= batch.width - lengths[:, None] if tokenizer.padding_side == "left" else columns < lengths[:, None]
    # the positions of all real tokens, row by row
    source = np.repeat(tokens.starts[batch.rows] - np.cumsum([0, *lengths[:-1]]), lengths) + np.arange(lengths.sum())
    features = dict(tokens.shared) | {"attention_mask": torch.from_numpy(real.astype(np.int64))}
    for name, flat in tokens.flat.items():
        padded = np.full(real.shape, filler.get(name) or 0, dtype=np.int64)
        padded[real] = flat[source]
        features[name] = torch.from_numpy(padded)
    return features


def padded_width(length: int) -> int:
    """The width of a batch whose longest text has `length` tokens.

    There are 16 widths from one power of two to the next: few shapes, and at most 1/16 of a batch is padding because of them.
    """
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def cut(lengths: np.ndarray, tokens_per_batch: int, longest: int | None = None) -> Iterator[Batch]:
    """Batches of at most `tokens_per_batch` padded tokens but at least one text, longest first.

    longest: the model's maximum sequence length, to which widths are rounded up at most. All batches of one width have the same
    number of rows, except the last: a kernel is chosen once per width.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = padded_width(max(1, int(lengths[order[start]])))
        width = width if longest is None else max(int(lengths[order[start]]), min(width, longest))
        rows = order[start : start + max(1, tokens_per_batch // width)]
        yield Batch(rows, width)
        start += len(rows)
