"""Shapes from fake tensors against real modules: parameters, FLOPs, and their growth with the length of a text."""

from __future__ import annotations

import pytest
import torch
from conftest import write_config
from encoders import FAMILIES, save_family
from live_bytes import LiveBytes
from plan.plans import inputs_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import DebertaV2Config, ModernBertConfig

from distill.config import load_config
from distill.objectives.loss_terms.relational import relational_losses
from distill.plan.architectures import Architecture, architecture_of
from distill.plan.planner import make_plan, plan_stage
from distill.plan.shapes import Growth, task_shape, teacher_shape
from distill.plan.step_cost import batch_bytes, collectives_per_step, loss_flops, loss_workspace
from distill.plan.zero_partition import ZeroSettings
from distill.student.encoder import load_encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_every_family_are_those_of_a_real_forward_pass(family, tiny_encoder, tmp_path):
    folder = save_family(family, tiny_encoder, tmp_path / family)
    shape = teacher_shape(architecture_of(str(folder)), is_bf16=False)
    encoder = load_encoder(str(folder)).eval()
    encoder.set_attn_implementation("eager")
    assert shape.num_parameters == sum(p.numel() for p in encoder.parameters())
    tokens = torch.ones((3, 28), dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    # a pooler's FLOPs do not grow with the length
    assert shape.forward_flops([(3, 28.0)]) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("config_class", [ModernBertConfig, DebertaV2Config])
def test_architectures_whose_modules_look_at_values_or_gradients_are_planned(config_class, tiny_encoder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]} if config_class is DebertaV2Config else {}
    architecture = Architecture(config_class(**sizes, **tokens, **relative), 32, False)
    config = load_config(write_config(tmp_path, tiny_encoder))
    shape = task_shape(config, "ckd", architecture, 32, is_bf16=False, on_cpu=False)
    flops = teacher_shape(architecture, is_bf16=True).forward_flops([(1, 16.0)])
    assert flops > shape.forward_flops([(1, 16.0)]) > 0  # the student has two of the four layers


def test_known_encoders_have_the_published_number_of_parameters():
    for name, millions in {
        "sentence-transformers/sentence-t5-xxl": 4865,
        "google-bert/bert-base-uncased": 109.5,
        "princeton-nlp/sup-simcse-roberta-large": 355.4,
        "huawei-noah/TinyBERT_General_4L_312D": 14.4,
        "sentence-transformers/all-mpnet-base-v2": 109.5,
    }.items():
        found = teacher_shape(architecture_of(name), is_bf16=True).num_parameters / 1e6
        assert found == pytest.approx(millions, rel=0.005), name


def test_growth_has_the_values_that_it_was_fitted_to():
    growth = Growth(100.0, 7.0, 0.5)
    again = Growth.fit([growth([(8, 16)]), growth([(8, 32)]), growth([(16, 16)])])
    assert again([(3, 11), (5, 40)]) == pytest.approx(growth([(3, 11), (5, 40)]))


def shape_of(tiny_encoder, folder, name: str, *overrides: str, teacher_dim: int = 32):
    config = load_config(write_config(folder, tiny_encoder), list(overrides))
    student = architecture_of(str(tiny_encoder))
    return config, task_shape(config, name, student, teacher_dim, is_bf16=False, on_cpu=True)


def test_a_stage_that_starts_from_hpd_has_its_head(tiny_encoder, tmp_path):
    _, hpd = shape_of(tiny_encoder, tmp_path, "hpd", "hpd.init=ckd")
    _, finetune = shape_of(
        tiny_encoder, tmp_path, "finetune", "hpd.init=ckd", "finetune.init=hpd", "stages=[ckd, hpd, finetune]"
    )
    _, plain = shape_of(tiny_encoder, tmp_path, "finetune")
    assert (finetune.student_dim, plain.student_dim) == (16, 32)
    assert finetune.num_parameters == hpd.num_parameters == plain.num_parameters + 32 * 16 + 16


@pytest.mark.parametrize(
    ("overrides", "is_there"),
    [
        ((), True),
        (("finetune.teacher_weight=0",), False),
        (("finetune.init=hpd", "hpd.init=ckd", "stages=[ckd,hpd,finetune]"), False),
        (("finetune.init=simcse", "simcse.init=ckd"), False),
        (("finetune.init=simcse", "simcse.init=ckd", "simcse.teacher_weight=1"), True),
        (("finetune.init=simcse", "simcse.init=student", "simcse.teacher_weight=1"), False),
    ],
)
def test_finetune_has_a_projection_only_if_the_student_that_it_starts_from_has(tiny_encoder, tmp_path, overrides, is_there):
    _, wide = shape_of(tiny_encoder, tmp_path, "finetune", *overrides, teacher_dim=48)
    _, same = shape_of(tiny_encoder, tmp_path, "finetune", *overrides)
    assert wide.num_trained - same.num_trained == is_there * (32 * 48 + 48)


@pytest.mark.parametrize("size", [40, 4000])
def test_a_smaller_vocabulary_has_a_smaller_table(size, tiny_encoder, tmp_path):
    _, whole = shape_of(tiny_encoder, tmp_path, "ckd")
    _, part = shape_of(tiny_encoder, tmp_path, "ckd", f"student.vocabulary={{from: text, size: {size}}}")
    tokens = architecture_of(str(tiny_encoder)).config.vocab_size
    assert whole.num_parameters - part.num_parameters == 32 * max(0, tokens - size)


def test_texts_of_the_teacher_term_are_encoded_but_not_contrasted_with_others(tiny_encoder, tmp_path):
    _, replays = shape_of(tiny_encoder, tmp_path, "finetune")
    _, plain = shape_of(tiny_encoder, tmp_path, "finetune", "finetune.teacher_weight=0")
    assert (replays.num_views, replays.texts_per_row, plain.num_views, plain.texts_per_row) == (3, 4, 3, 3)
    assert batch_bytes(replays) == batch_bytes(plain) == 16 * 2 * 4 * 32
    assert loss_flops(replays, 8) == loss_flops(plain, 8)
    assert loss_workspace(replays, 4 * 8, 2) == loss_workspace(plain, 3 * 8, 2)
    views = [collectives_per_step(shape, ZeroSettings(), 2, 1)[:2] for shape in (replays, plain)]
    assert views[0] == views[1]


def test_a_rank_with_a_part_of_the_queue_compares_the_queries_of_all_ranks_with_it(tiny_encoder, tmp_path):
    same = ("ckd.tile=64", "ckd.queue=4096", "ckd.weights={ckd: 1}")
    _, whole = shape_of(tiny_encoder, tmp_path, "ckd", *same)
    _, part = shape_of(tiny_encoder, tmp_path, "ckd", *same, "ckd.queue_placement=sharded")
    assert loss_workspace(whole, 8, 16) == loss_workspace(whole, 8, 1) == loss_workspace(part, 8, 1)
    assert loss_workspace(part, 8, 16) == 4 * (16 * 8 * (64 + 5 * 32) + 64 * 32)


@pytest.mark.parametrize("rows, batch, width, teacher_dim, nested", [(64, 512, 16, 32, []), (512, 512, 16, 32, [8, 4])])
def test_the_relational_term_takes_as_much_memory_as_planned(rows, batch, width, teacher_dim, nested, tiny_encoder, tmp_path):
    overrides = (f"hpd.global_batch={batch}", "hpd.weights={relational: 1}", f"hpd.nested={nested}", f"hpd.dim={width}")
    _, shape = shape_of(tiny_encoder, tmp_path, "hpd", *overrides, teacher_dim=teacher_dim)
    vectors = torch.randn(batch, width, requires_grad=True)
    teacher = torch.nn.functional.normalize(torch.randn(batch, teacher_dim), dim=1).half()
    with LiveBytes() as memory:
        temperatures = {"student_temperature": 0.05, "teacher_temperature": 0.05}
        losses, _ = relational_losses(vectors, teacher, torch.arange(rows), sizes=[width, *nested], **temperatures)
        losses.sum().backward()
    assert 0.9 * memory.peak <= loss_workspace(shape, rows, 2) <= 1.3 * memory.peak


def test_the_teacher_reads_more_of_a_long_text_than_the_student(tiny_encoder, tmp_path):
    config = load_config(write_config(tmp_path, tiny_encoder), ["teacher.max_length=60", "student.max_length=8"])
    teacher, student = [], []
    for tokens in (6, 60):
        inputs = inputs_of(config, tokens_per_text=tokens, num_texts=640)
        plan = make_plan(inputs)
        teacher.append(plan.teacher.flops)
        student.append(plan_stage(inputs, "ckd").chosen.seconds_per_step["compute"])
    assert teacher[1] > 5 * teacher[0] and student[1] < 2 * student[0]


def test_the_teacher_does_not_read_what_a_reused_run_has(embedded_copy):
    path, _ = embedded_copy
    flops = [
        make_plan(inputs_of(load_config(path, ["name=new", *overrides]), num_texts=1200)).teacher.flops
        for overrides in ([], ["shards.reuse=[tiny]"])
    ]
    assert flops[1] / flops[0] == pytest.approx((1200 + 24 - 600) / (1200 + 24))


def test_a_frozen_encoder_encodes_all_texts_once_and_only_its_head_takes_steps(tiny_encoder, tmp_path):
    shapes, plans = [], []
    for is_frozen in (True, False):
        overrides = (f"hpd.freeze_encoder={is_frozen}", "hpd.weights={relational: 1}", "hpd.global_batch=64")
        config, shape = shape_of(tiny_encoder, tmp_path, "hpd", *overrides, "hpd.epochs=3", "hpd.max_steps=null")
        shapes.append(shape)
        plans.append(plan_stage(inputs_of(config, tokens_per_text=12, num_texts=640), "hpd"))
    frozen, trained = plans
    assert shapes[0].forward_flops == shapes[1].forward_flops and shapes[0].activations([(8, 16.0)]) == 0
    step, full_step = frozen.chosen.seconds_per_step, trained.chosen.seconds_per_step
    assert frozen.steps == trained.steps == 30 and step["compute"] == 0 and full_step["compute"] > 0
    assert step["loss"] == full_step["loss"] > 0
    assert frozen.frozen_encoder_bytes == 640 * 32 * 2 and trained.frozen_encoder_bytes == trained.frozen_encoder_seconds == 0
    evaluated = frozen.seconds - frozen.frozen_encoder_seconds - frozen.steps * step["total"]
    assert evaluated > 0 and trained.seconds == pytest.approx(evaluated + trained.steps * full_step["total"])
