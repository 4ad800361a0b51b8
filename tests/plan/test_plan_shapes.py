"""Shapes on fake tensors against the real modules: parameters, operations, and how they grow with the length of a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import write_config
from encoders import FAMILIES, save_family
from torch.utils.flop_counter import FlopCounterMode

from distill.config import load_config
from distill.plan.corpus import Corpus
from distill.plan.devices import load_devices
from distill.plan.encoders import architecture_of
from distill.plan.memory import keys_bytes, loss_bytes
from distill.plan.plan import make_plan, models_of
from distill.plan.shapes import Growth, task_shape, teacher_shape
from distill.plan.time import Cluster, loss_operations
from distill.plan.wire import sent_in_a_step
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


def shape_of(tiny_encoder, folder, name: str, *overrides: str, teacher_dim: int = 32):
    config = load_config(write_config(folder, tiny_encoder), list(overrides))
    student = architecture_of(str(tiny_encoder))
    return config, task_shape(config, name, student, teacher_dim, is_bf16=False, on_cpu=True)


def test_a_stage_that_goes_on_from_hpd_has_its_head(tiny_encoder, tmp_path):
    _, hpd = shape_of(tiny_encoder, tmp_path, "hpd", "hpd.init=ckd")
    _, finetune = shape_of(tiny_encoder, tmp_path, "finetune", "hpd.init=ckd", "finetune.init=hpd")
    _, plain = shape_of(tiny_encoder, tmp_path, "finetune")
    assert (finetune.width, plain.width) == (16, 32)
    assert finetune.numel() == hpd.numel() == plain.numel() + 32 * 16 + 16


@pytest.mark.parametrize(
    ("overrides", "is_there"),
    [
        ((), True),
        (("finetune.teacher_weight=0",), False),
        (("finetune.init=hpd", "hpd.init=ckd"), False),
        (("finetune.init=simcse", "simcse.init=ckd"), False),
        (("finetune.init=simcse", "simcse.init=ckd", "simcse.teacher_weight=1"), True),
        (("finetune.init=simcse", "simcse.init=student", "simcse.teacher_weight=1"), False),
    ],
)
def test_a_student_is_held_to_its_teacher_by_the_projection_that_it_brings(tiny_encoder, tmp_path, overrides, is_there):
    _, wide = shape_of(tiny_encoder, tmp_path, "finetune", *overrides, teacher_dim=48)
    _, same = shape_of(tiny_encoder, tmp_path, "finetune", *overrides)
    assert wide.numel(trained=True) - same.numel(trained=True) == is_there * (32 * 48 + 48)


def test_replayed_sentences_are_encoded_and_held_against_no_others(tiny_encoder, tmp_path):
    config, replays = shape_of(tiny_encoder, tmp_path, "finetune")
    bare = ["finetune.teacher_weight=0"]
    without, plain = shape_of(tiny_encoder, tmp_path, "finetune", *bare)
    assert (replays.views, replays.encoded, plain.views, plain.encoded) == (3, 4, 3, 3)
    assert keys_bytes(replays, config.finetune) == keys_bytes(plain, without.finetune) == 16 * 2 * 4 * 32
    assert loss_operations(replays, config.finetune, 8) == loss_operations(plain, without.finetune, 8)
    assert loss_bytes(replays, config.finetune, 4 * 8) == loss_bytes(plain, without.finetune, 3 * 8)
    sent = [sent_in_a_step(shape, made.finetune, {}, 2, 1)[:2] for shape, made in ((replays, config), (plain, without))]
    assert sent[0] == sent[1]


def test_a_frozen_encoder_reads_the_text_once_and_its_head_alone_takes_steps(tiny_encoder, tmp_path):
    table = load_devices()
    cluster = Cluster(1, 2, "cpu", table.devices["cpu"], table.assumed, is_bf16=False)
    frozen, plans = {}, {}
    for is_frozen in (True, False):
        overrides = (f"hpd.freeze_encoder={is_frozen}", "hpd.weights={relational: 1}", "hpd.global_batch=64")
        config, shape = shape_of(tiny_encoder, tmp_path, "hpd", *overrides, "hpd.epochs=3", "hpd.max_steps=null")
        corpus = Corpus(640, 0, 50.0, np.full(100, 12), {"sentences": "given", "tokens": "given", "text": "given"})
        frozen[is_frozen] = shape
        hpd_only = config.model_copy(update={"stages": ["hpd"]})
        plans[is_frozen] = make_plan(hpd_only, cluster, corpus, models_of(config)).stages[0]
    once, always = plans[True], plans[False]
    assert frozen[True].once == frozen[False].flops and frozen[True].activations([(8, 16.0)]) == 0
    assert once.steps == always.steps == 30 and once.step.compute == 0 and always.step.compute > 0
    assert once.step.loss == always.step.loss > 0
    assert once.once_bytes == 640 * 32 * 2 and always.once_bytes == always.once_seconds == 0
    evaluated = once.seconds - once.once_seconds - once.steps * once.step.total
    assert evaluated > 0 and always.seconds == pytest.approx(evaluated + always.steps * always.step.total)
