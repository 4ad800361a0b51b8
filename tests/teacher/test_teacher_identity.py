"""The identity changes with everything that changes the vectors, and with nothing else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_encoder, write_config

from distill.config import load_config
from distill.run.files import DigestCache
from distill.student.student_config import StudentConfig
from distill.teacher.identity import check_teacher, initial_student, pinned, teacher_identity
from distill.teacher.teacher_config import TeacherConfig


def identity(encoder, precision="fp32", **config):
    return identity_of(TeacherConfig(model=str(encoder), pooling="mean", **config), precision)


def identity_of(config, precision="fp32"):
    with tempfile.TemporaryDirectory() as folder:
        return teacher_identity(config, precision, DigestCache(Path(folder) / "digests.json"))


def test_batch_size_and_tasks_do_not_change_the_identity(tiny_encoder):
    assert identity(tiny_encoder) == identity(tiny_encoder, tokens_per_batch=17, tasks=5)


@pytest.mark.parametrize("change", [{"prompt": "query: "}, {"max_length": 16}, {"precision": "bf16"}, {"revision": "abc"}])
def test_settings_that_change_vectors_change_the_identity(tiny_encoder, change):
    assert identity(tiny_encoder, **change) != identity(tiny_encoder)


def test_other_weights_or_another_vocabulary_in_the_same_place_are_another_teacher(tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    before = identity(encoder)
    shutil.copy(make_encoder(tmp_path / "other", seed=1) / "model.safetensors", encoder)
    changed = identity(encoder)
    assert changed != before
    (encoder / "vocab.txt").write_text((encoder / "vocab.txt").read_text().replace("teacher", "pupil"))
    assert identity(encoder) != changed


def test_given_vectors_are_known_by_their_bytes(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((3, 4)))
    config = TeacherConfig(vectors=str(tmp_path / "v.npy"))
    before = identity_of(config)
    assert before == identity_of(config, "bf16")
    np.save(tmp_path / "v.npy", np.zeros((3, 4)))
    assert identity_of(config) != before


def test_shards_of_another_teacher_are_refused_with_every_difference_named(tmp_path, tiny_encoder):
    config = load_config(write_config(tmp_path, tiny_encoder))
    made_by = identity_of(config.teacher)
    check_teacher(config.teacher, config.shards_dir, SimpleNamespace(teacher=made_by))
    other = SimpleNamespace(teacher=made_by | {"prompt": "query: ", "max_length": 64})
    with pytest.raises(ValueError, match=r"max_length: 64 in the shards, 32 in the config; teacher\.prompt: 'query: ' in the"):
        check_teacher(config.teacher, config.shards_dir, other)


def test_the_identity_has_weights_only_where_they_differ(tiny_encoder):
    def of(first=None, second=None):
        return identity(tiny_encoder, weight=first, concat=[{"model": str(tiny_encoder), "pooling": "cls", "weight": second}])

    assert of() == of(1) == of(2, 2) and "weight" not in of() | of()["concat"][0]
    assert of(2, 1) == of(2) != of() and of(1, 2) == of(None, 2) != of(2)
    assert of(2)["weight"] == 2 and "weight" not in of(2)["concat"][0]
    with pytest.raises(ValueError, match=r"teacher\.weight: None in the shards, 2\.0 in the config"):
        config = TeacherConfig(model=str(tiny_encoder), pooling="mean", weight=2, concat=[{"model": str(tiny_encoder)}])
        made_by = identity_of(config.model_copy(update={"weight": None}))
        check_teacher(config, Path("shards"), SimpleNamespace(teacher=made_by))


def test_a_weight_without_further_encoders_is_refused(tiny_encoder):
    with pytest.raises(ValueError, match=r"teacher\.weight is for several encoders"):
        TeacherConfig(model=str(tiny_encoder), weight=2)


def test_hub_models_are_loaded_at_the_commits_that_the_shards_record(tiny_encoder):
    config = TeacherConfig(model="owner/name", revision="main", concat=[{"model": str(tiny_encoder), "pooling": "mean"}])
    recorded = {"files": {"commit": "c0ffee"}, "concat": [{"files": {"model.safetensors": "1"}}]}
    found = pinned(config, SimpleNamespace(teacher=recorded))
    assert [model.revision for model in found.models] == ["c0ffee", None]
    assert pinned(TeacherConfig(vectors="v.npy"), SimpleNamespace(teacher={})).models[0].revision is None


def test_a_student_that_begins_as_the_teacher_has_its_revision():
    teacher = TeacherConfig(model="owner/name", revision="c0ffee")
    assert initial_student(StudentConfig(), teacher).revision == "c0ffee"
    assert initial_student(StudentConfig(revision="1"), teacher).revision == "1"
    assert initial_student(StudentConfig(init="owner/other"), teacher).revision is None
