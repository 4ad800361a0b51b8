"""teacher.dimensions keeps the first dimensions of a model's vectors, of given ones, and of a student that begins as it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sentences, write_config
from encoders import save_sentence_transformer
from sentence_transformers import SentenceTransformer

from distill.config import load_config, stage_of
from distill.corpus import TextChunk
from distill.doctor.needs import student_width
from distill.doctor.preflight import problems
from distill.plan.devices import find_cluster, load_devices
from distill.plan.planner import collect_inputs
from distill.plan.shapes import task_shape
from distill.run.files import DigestCache, fingerprint
from distill.run.stage import differences
from distill.shards import ShardReader
from distill.student.initial import build_student
from distill.student.student_config import StudentConfig
from distill.teacher.encoder import Teacher
from distill.teacher.identity import check_teacher, initial_student, teacher_identity
from distill.teacher.imported import ImportedVectors
from distill.teacher.teacher_config import TeacherConfig

CPU = torch.device("cpu")
TEXTS = sentences(20)


@pytest.fixture
def folder(tiny_encoder, tmp_path):
    return str(save_sentence_transformer(tiny_encoder, tmp_path / "model"))


def identity_of(config):
    with tempfile.TemporaryDirectory() as place:
        return teacher_identity(config, "fp32", DigestCache(Path(place) / "digests.json"))


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("own", [None, 20])
def test_the_vectors_are_those_that_sentence_transformers_truncates(tiny_encoder, tmp_path, own):
    folder = str(save_sentence_transformer(tiny_encoder, tmp_path / "model", truncate_dim=own))
    for size in (12, 24):
        expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, truncate_dim=size, normalize_embeddings=True)
        teacher = Teacher(TeacherConfig(model=folder, dimensions=size), CPU, None)
        found = teacher.encode(teacher.read(TextChunk(TEXTS, None, None)))
        assert found.dtype == np.float16 and found.shape == (20, size) and teacher.dim == size
        assert np.allclose(found, expected, atol=1e-3)
        assert np.allclose(np.linalg.norm(found.astype(np.float32), axis=1), 1, atol=1e-3)


def test_each_of_several_encoders_has_its_own(folder):
    teacher = Teacher(TeacherConfig(model=folder, dimensions=8, concat=[{"model": folder, "dimensions": 5}]), CPU, None)
    whole = Teacher(TeacherConfig(model=folder), CPU, None)(TEXTS)
    found = teacher(TEXTS)
    assert found.shape == (20, 13)
    assert np.allclose(cosines(found[:, :8], whole[:, :8]), 1, atol=1e-3)
    assert np.allclose(cosines(found[:, 8:], whole[:, :5]), 1, atol=1e-3)


def test_given_vectors_are_cut_and_normalised_again(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    config = TeacherConfig(vectors=str(tmp_path / "v.npy"), dimensions=3)
    found = ImportedVectors(config)
    expected = vectors[:, :3] / np.linalg.norm(vectors[:, :3], axis=1, keepdims=True)
    assert found.dim == 3 and np.allclose(found.read(TextChunk([], np.arange(9), None)), expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"teacher\.dimensions 9 is above the 8 dimensions of .*v\.npy"):
        ImportedVectors(config.model_copy(update={"dimensions": 9}))


def test_an_untrained_full_copy_has_the_teachers_vectors(folder):
    config = TeacherConfig(model=folder, dimensions=12)
    student = build_student(initial_student(StudentConfig(), config), folder, 0).eval()
    assert student.width == 12 and cosines(student.encode(TEXTS), Teacher(config, CPU, None)(TEXTS)).min() > 0.99999


def test_a_students_own_truncation_is_kept_and_more_than_it_has_is_refused(folder):
    teacher = TeacherConfig(model=folder, dimensions=12)
    assert initial_student(StudentConfig(truncate_dim=5), teacher).truncate_dim == 5
    assert initial_student(StudentConfig(init="other"), teacher).truncate_dim is None
    assert initial_student(StudentConfig(pooling="concat_last4_mean"), teacher).truncate_dim is None
    assert build_student(StudentConfig(init=folder, truncate_dim=5), None, 0).width == 5
    with pytest.raises(ValueError, match=r"student\.truncate_dim 33 is above the 32 dimensions"):
        build_student(StudentConfig(init=folder, truncate_dim=33), None, 0)


def test_more_than_the_model_has_is_refused_on_loading(folder):
    with pytest.raises(ValueError, match=r"teacher\.dimensions 33 is above the 32 dimensions"):
        Teacher(TeacherConfig(model=folder, dimensions=33), CPU, None)


def lines(path, *overrides):
    return [str(problem) for problem in problems(load_config(path, list(overrides)))]


def test_preflight_knows_the_width_and_refuses_more_than_the_model_has(tmp_path, tiny_encoder, folder):
    path = write_config(tmp_path, tiny_encoder)
    cut = (f"teacher.model={folder}", "teacher.pooling=null", "teacher.dimensions=12")
    assert lines(path, *cut, "hpd.dim=12") == []
    (line,) = lines(path, *cut)
    assert "hpd.dim 16 is above the width of the teacher's vectors, 12" in line
    for key in ("teacher.dimensions", "student.truncate_dim"):
        (line,) = lines(path, f"{key}=33")
        assert line.startswith(key) and "33 is above the 32 dimensions" in line
    np.save(tmp_path / "v.npy", np.ones((600, 8)))
    given = f"teacher={{vectors: {tmp_path}/v.npy, dimensions: 9}}"
    assert "above the 8 dimensions" in lines(path, given, f"student.init={tiny_encoder}")[0]


def test_plan_and_needs_have_the_width(tmp_path, tiny_encoder):
    path = write_config(tmp_path, tiny_encoder)
    config = load_config(path, ["teacher.dimensions=12", "hpd.dim=12"])
    inputs = collect_inputs(config, find_cluster(config, load_devices(), name="cpu"))
    assert inputs.teacher_dim == 12 == student_width(config)
    shape = task_shape(config, "ckd", inputs.student, inputs.teacher_dim, is_bf16=False, on_cpu=True)
    assert shape.encoder_dim == 12 and shape.teacher_dim == 12
    with pytest.raises(ValueError, match=r"teacher\.dimensions 33 is above the 32 dimensions"):
        collect_inputs(load_config(path, ["teacher.dimensions=33"]), inputs.cluster)


def test_the_identity_has_it_only_where_it_is_set_also_in_concat(folder):
    plain = TeacherConfig(model=folder, concat=[{"model": folder}])
    cut = TeacherConfig(model=folder, concat=[{"model": folder, "dimensions": 7}])
    assert "dimensions" not in identity_of(plain) and "dimensions" not in identity_of(plain)["concat"][0]
    assert identity_of(cut)["concat"][0]["dimensions"] == 7
    assert fingerprint(identity_of(plain)) != fingerprint(identity_of(plain.model_copy(update={"dimensions": 9})))
    for made_by, wanted in ((plain, cut), (plain, plain.model_copy(update={"dimensions": 9}))):
        with pytest.raises(ValueError, match="made by another teacher"):
            check_teacher(wanted, Path("shards"), SimpleNamespace(teacher=identity_of(made_by)))


def test_a_finished_set_of_a_version_without_the_keys_is_still_accepted(tmp_path, tiny_encoder):
    path = write_config(tmp_path, tiny_encoder)
    concat = f"teacher.concat=[{{model: {tiny_encoder}, pooling: cls}}]"
    config = load_config(path, [concat])
    stage = stage_of(config, "precompute")
    assert stage.run(CPU)
    done = config.run_dir / "precompute/DONE.json"
    record = json.loads(done.read_text())
    for entry in [record["settings"]["teacher"], *record["settings"]["teacher"]["concat"]]:
        del entry["dimensions"], entry["weight"]
    assert differences(record["settings"], stage.settings("result")) == [] and stage.changes_since(record) == []
    check_teacher(config.teacher, config.shards_dir, ShardReader(config.shards_dir).manifest)
    other = load_config(path, [concat, "teacher.dimensions=12"])
    assert "teacher.dimensions: null -> 12" in stage_of(other, "precompute").reason_to_run()
