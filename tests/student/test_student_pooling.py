"""Pooling against a slow, obvious reference; padding never counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import sentences
from encoders import FAMILIES, save_family

from distill.student.initial import build_student
from distill.student.pooling import pool
from distill.student.student_config import Pooling, StudentConfig

POOLINGS = get_args(Pooling)


def reference(pooling, hidden, pooled, mask):
    rows = []
    for row in range(len(mask)):
        length = int(mask[row].sum())
        last = [hidden[layer][row].double().numpy() for layer in range(len(hidden))]
        if pooling == "cls":
            rows.append(last[-1][0])
        elif pooling == "pooler":
            rows.append(pooled[row].double().numpy())
        elif pooling == "lasttoken":
            rows.append(last[-1][length - 1])
        elif pooling == "weightedmean":
            rows.append(np.average(last[-1][:length], axis=0, weights=np.arange(1, length + 1)))
        elif pooling == "mean_sqrt_len_tokens":
            rows.append(last[-1][:length].sum(axis=0) / length**0.5)
        else:
            layers = {
                "mean": last[-1:],
                "max": last[-1:],
                "first_last_mean": [last[1], last[-1]],
                "last2_mean": last[1:][-2:],
                "all_mean": last[1:],
            }.get(pooling, last[1:][-4:])
            means = [np.mean([layer[token] for token in range(length)], axis=0) for layer in layers]
            if pooling.startswith("concat"):
                rows.append(np.concatenate(means))
            elif pooling.endswith("max"):
                mixed = np.mean(layers, axis=0)
                rows.append(np.array([max(mixed[token][element] for token in range(length)) for element in range(8)]))
            else:
                rows.append(np.mean(means, axis=0))
    return np.array(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 3, 6])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_is_its_definition(pooling, layers, dtype):
    torch.manual_seed(0)
    hidden = [torch.randn(5, 7, 8).to(dtype) for _ in range(layers + 1)]
    pooled = torch.randn(5, 8).to(dtype)
    mask = (torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]).long()
    output = SimpleNamespace(last_hidden_state=hidden[-1], hidden_states=tuple(hidden), pooler_output=pooled)
    found = pool(pooling, output, mask)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), reference(pooling, hidden, pooled, mask), atol=1e-6)


def build(pooling, encoder):
    config = StudentConfig(init=str(encoder), pooling=pooling, max_length=32)
    return build_student(config, None, 0).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_sentence_has_one_vector_alone_in_a_batch_and_among_chunks(pooling, tiny_encoder):
    student = build(pooling, tiny_encoder)
    texts = sentences(12)
    alone = torch.cat([student(student.tokenize([text])) for text in texts])
    together = student(student.tokenize(texts))
    chunks = student(*(student.tokenize(texts[start:stop]) for start, stop in [(0, 1), (1, 7), (7, 12)]))
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(chunks, alone, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_never_counts_in_any_family(family, tiny_encoder, tmp_path):
    student = build("mean", save_family(family, tiny_encoder, tmp_path / family))
    tokens = student.tokenize(sentences(6))
    padded = {name: torch.nn.functional.pad(value, (0, 8)) for name, value in tokens.items()}
    padded["input_ids"][:, -8:] = 7  # any token at all: the mask says it is none
    assert torch.allclose(student(padded), student(tokens), atol=1e-5)


def test_a_pooler_that_is_not_there_is_refused(tiny_encoder, tmp_path):
    for family in ("distilbert", "t5"):
        with pytest.raises(ValueError, match="pooling is pooler, but the"):
            build("pooler", save_family(family, tiny_encoder, tmp_path / family))
