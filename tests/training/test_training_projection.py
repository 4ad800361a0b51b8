"""The projection to the teacher's width: its initial value, what stays fixed; students' vectors in the teacher's space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_encoder, sentences, write_config
from distributed_ranks import on_ranks
from encoders import encoder_and_tokenizer
from engines import CPU, embed_text, train_stage

from distill.config import load_config, stage_of
from distill.shards import ShardReader
from distill.student import Student
from distill.student.student import load_extra, student_in_teacher_space
from distill.student.student_config import StudentConfig
from distill.training.projection import Sample, build_projection, encode_sample, fit_projection, ridge_regression


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_encoder):
    """Teacher vectors of 32 dimensions, and the config of a student that is only 16 wide."""
    folder = tmp_path_factory.mktemp("run")
    narrow = make_encoder(folder / "narrow", layers=2, width=16, seed=3)
    path = embed_text(write_config(folder, tiny_encoder, student=f"{{init: {narrow}, max_length: 32}}"))
    return path, load_config(path)


def fitted(config, how: str):
    reader = ShardReader(config.run_dir / "shards")
    student = Student(*encoder_and_tokenizer(config.student, None, 0), pooling="mean", max_length=32)
    projection = build_projection(student.width, reader.dim, how)
    fit_projection(projection, student, reader, how, seed=0)
    rows = np.arange(300)
    return projection, student.encode(reader.texts(rows), normalize=False), reader, rows


def test_a_learned_projection_begins_as_the_nearest_linear_map(run):
    projection, vectors, reader, rows = fitted(run[1], "linear")
    assert all(parameter.requires_grad for parameter in projection.parameters())
    teacher = torch.from_numpy(reader.vectors(rows)).float()
    error = (projection(torch.from_numpy(vectors)) - teacher).square().sum(dim=1).mean()
    spread = (teacher - teacher.mean(dim=0)).square().sum(dim=1).mean()
    assert error < 0.9 * spread


@pytest.mark.parametrize("how", ["pca", "procrustes"])
def test_a_fixed_projection_has_orthonormal_columns_and_is_not_trained(run, how):
    projection, *_ = fitted(run[1], how)
    assert not any(parameter.requires_grad for parameter in projection.parameters())
    weight = projection.weight.double()
    assert torch.allclose(weight.T @ weight, torch.eye(16, dtype=torch.float64), atol=1e-5)
    assert not projection.bias.any()


def test_pca_spans_the_teachers_first_components(run):
    projection, _, reader, _ = fitted(run[1], "pca")
    assert np.allclose(projection.weight.T.numpy(), reader.moments.pca(16)[0], atol=1e-6)


def test_procrustes_brings_the_untrained_student_nearer_than_pca_does(run):
    means = {}
    for how in ("pca", "procrustes"):
        projection, vectors, reader, rows = fitted(run[1], how)
        queries = torch.nn.functional.normalize(projection(torch.from_numpy(vectors)), dim=1)
        means[how] = (queries * torch.from_numpy(reader.vectors(rows)).float()).sum(dim=1).mean().item()
    assert means["procrustes"] > means["pca"] + 0.01


def test_ridge_regression_finds_a_linear_map():
    draw = np.random.default_rng(0)
    vectors, weight, bias = draw.normal(size=(500, 4)), draw.normal(size=(3, 4)), draw.normal(size=3)
    found_weight, found_bias = ridge_regression(vectors, vectors @ weight.T + bias)
    assert np.allclose(found_weight, weight, atol=0.01) and np.allclose(found_bias, bias, atol=0.01)


@pytest.mark.parametrize("how", ["linear", "procrustes"])
def test_queries_of_a_trained_student_find_the_vectors_that_the_teacher_stored(run, how):
    path, config = run
    base = config.run_dir.parent
    own = [f"name={how}", f"shards_from={config.name}"]
    steps = [f"ckd.projection={how}", "ckd.max_steps=30", "ckd.epochs=5", "ckd.save_every=100"]
    on_ranks(1, train_stage, path, "ckd", [*own, *steps])
    folder = base / how / "ckd/student"
    reader = ShardReader(config.run_dir / "shards")
    rows = np.arange(200)
    cosines = student_in_teacher_space(folder).encode(reader.texts(rows)) @ reader.vectors(rows).astype(np.float32).T
    ranks = (cosines > cosines.diagonal()[:, None]).sum(axis=1)
    assert np.median(ranks) < 40  # by chance, 100
    if how == "procrustes":
        projection, vectors, *_ = fitted(config, how)  # vectors without the direction that layer norm takes away
        kept = load_extra(folder)["projection.weight"]
        assert np.allclose(vectors @ kept.numpy().T, vectors @ projection.weight.numpy().T, atol=1e-4)


def test_a_compact_head_begins_with_the_map_that_ckd_learned(run, tiny_encoder):
    path, config = run
    own = ["name=map", f"shards_from={config.name}", "ckd.projection=linear", "hpd.init=ckd", "hpd.dim=8", "hpd.nested=[4]"]
    on_ranks(1, train_stage, path, "ckd", [*own, "ckd.max_steps=5", "ckd.save_every=100"])
    trained = load_config(path, [*own, "hpd.head=linear"])
    reader = ShardReader(config.run_dir / "shards")
    components = reader.moments.pca(8)[0]
    stage = stage_of(trained, "hpd")
    student = stage.build(stage.setup(CPU, None)).module.student
    texts = reader.texts(np.arange(200))
    found = student.encode(texts)
    wanted = student_in_teacher_space(trained.run_dir / "ckd/student").encode(texts) @ components.T
    assert np.allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-4)

    bare = stage_of(load_config(path, [*own, "hpd.init=student"]), "hpd")
    assert bare._learned_map(bare.setup(CPU, None).student, components) is None
    layers = f"student={{init: {tiny_encoder}, layers: [0, 2]}}"
    as_wide = [*own, layers, "name=wide", "ckd.projection=none", "finetune.init=ckd"]
    student = stage_of(load_config(path, [*as_wide, "hpd.init=student"]), "hpd").setup(CPU, None).student
    after = stage_of(load_config(path, [*as_wide, "hpd.init=finetune"]), "hpd")
    student.is_aligned = True  # as ckd leaves it
    student.save(after.context.run_dir / "finetune/student", student.state_dict())
    weight, bias = after._learned_map(after.setup(CPU, None).student, components)
    assert (weight == components).all() and not bias.any()


def test_the_vectors_of_a_sample_are_those_of_one_call_and_a_stop_is_checked_in_between(tiny_encoder, monkeypatch):
    monkeypatch.setattr("distill.training.projection.TEXTS_PER_CHECK", 64)
    config = StudentConfig(init=str(tiny_encoder), layers=[0, 2])
    student = Student(*encoder_and_tokenizer(config, None, 0), pooling="mean", max_length=32)
    texts, checks = sentences(200), []
    found = encode_sample(student, Sample(texts, [None] * len(texts), np.empty(0)), lambda: checks.append(1), normalize=True)
    assert np.array_equal(found, student.encode(texts).astype(np.float64)) and len(checks) == 4
