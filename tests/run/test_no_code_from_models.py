"""Python files of a model folder never run, even where the question whether to trust them is answered with yes."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from conftest import make_encoder, sentences, write_config
from encoders import encoder_and_tokenizer
from foreign_code import PLACES, add_foreign_code, foreign_folder
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from distill.config import load_config
from distill.doctor.preflight import problems
from distill.evaluation.model_encoder import encoder_of
from distill.export.folder import export_student
from distill.plan import text_estimate
from distill.plan.architectures import architecture_of
from distill.student import Student
from distill.student.student_config import StudentConfig
from distill.teacher.encoder import Teacher
from distill.teacher.teacher_config import TeacherConfig


@pytest.fixture
def yes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))


@pytest.fixture(params=PLACES)
def where(request):
    return request.param


refused = contextlib.suppress(ValueError, KeyError, OSError, ImportError, AttributeError, TypeError)


@pytest.mark.parametrize("pooling", ["mean", "pooler", None])
def test_of_a_teacher(tiny_encoder, tmp_path, yes, where, pooling):
    config = TeacherConfig(
        model=str(foreign_folder(tiny_encoder, tmp_path / "model", where, tmp_path / "ran")), pooling=pooling
    )
    with refused:
        Teacher(config, torch.device("cpu"), None)(["a text"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("from_scratch", [False, True])
def test_of_an_initial_student(tiny_encoder, tmp_path, yes, where, from_scratch):
    folder = foreign_folder(tiny_encoder, tmp_path / "model", where, tmp_path / "ran")
    with refused:
        encoder_and_tokenizer(StudentConfig(init=str(folder), from_scratch=from_scratch), None, 0)
    assert not (tmp_path / "ran").exists()


def test_of_an_evaluated_model(tiny_encoder, tmp_path, yes, where):
    with refused:
        encoder_of(foreign_folder(tiny_encoder, tmp_path / "model", where, tmp_path / "ran"), device="cpu")(["a text"])
    assert not (tmp_path / "ran").exists()


def test_of_what_is_checked_or_planned(tiny_encoder, tmp_path, yes, where):
    folder = foreign_folder(tiny_encoder, tmp_path / "model", where, tmp_path / "ran")
    for overrides in ([], ["teacher.pooling=null"]):
        with refused:
            problems(load_config(write_config(tmp_path, folder), overrides))
    with refused:
        architecture_of(str(folder))
    with refused:
        text_estimate._load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_of_an_exported_student(tmp_path, yes, where):
    config = StudentConfig(init=str(make_encoder(tmp_path / "encoder")))
    student = Student(*encoder_and_tokenizer(config, None, 0), pooling="mean", max_length=32).eval()
    student.save(tmp_path / "student", student.state_dict())
    add_foreign_code(tmp_path / "student", where, tmp_path / "ran")
    with refused:
        export_student(tmp_path / "student", tmp_path / "export", card=lambda _: "", check_on=sentences(3))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["config", "first module"])
def test_these_folders_do_run_their_code_where_they_are_trusted(tiny_encoder, tmp_path, place):
    folder = foreign_folder(tiny_encoder, tmp_path / "model", place, tmp_path / "ran")
    with refused:
        if place == "config":
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        else:
            SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
