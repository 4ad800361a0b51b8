"""Shapes on fake tensors against the real modules: parameters, operations, and how they grow with the length of a sentence."""

from __future__ import annotations

import pytest
import torch
from encoders import FAMILIES, save_family
from torch.utils.flop_counter import FlopCounterMode

from distill.plan.encoders import architecture_of
from distill.plan.shapes import Growth, teacher_shape
from distill.student.encoder import load_encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_every_family_are_those_of_a_real_forward_pass(family, tiny_encoder, tmp_path):
    folder = save_family(family, tiny_encoder, tmp_path / family)
    shape = teacher_shape(architecture_of(str(folder)), is_bf16=False)
    encoder = load_encoder(str(folder)).eval()
    encoder.set_attn_implementation("eager")
    assert shape.numel == sum(p.numel() for p in encoder.parameters())
    tokens = torch.ones((3, 28), dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    # a pooler works once a sentence, however long
    assert shape.flops([(3, 28.0)]) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_known_encoders_have_the_published_number_of_parameters():
    for name, millions in {
        "sentence-transformers/sentence-t5-xxl": 4865,
        "google-bert/bert-base-uncased": 109.5,
        "princeton-nlp/sup-simcse-roberta-large": 355.4,
        "huawei-noah/TinyBERT_General_4L_312D": 14.4,
        "sentence-transformers/all-mpnet-base-v2": 109.5,
    }.items():
        found = teacher_shape(architecture_of(name), is_bf16=True).numel / 1e6
        assert found == pytest.approx(millions, rel=0.005), name


def test_growth_goes_through_what_it_was_made_from():
    growth = Growth(100.0, 7.0, 0.5)
    again = Growth.through([growth([(8, 16)]), growth([(8, 32)]), growth([(16, 16)])])
    assert again([(3, 11), (5, 40)]) == pytest.approx(growth([(3, 11), (5, 40)]))
