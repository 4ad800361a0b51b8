"""An exported folder gives the student's vectors without this project; what does not agree never appears."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import sentences
from encoders import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from distill.config import StudentConfig
from distill.export.sentence_transformers import export_student, layer_weights
from distill.student import Student
from distill.student.encoder import build_encoder

TEXTS = [*sentences(20), "the model reads a tensor from a queue of keys and writes it to a shard " * 4]


def make_student(folder, encoder, *, pooling="mean", head=None, max_length=30, layers=None):
    config = StudentConfig(init=str(encoder), pooling=pooling, layers=layers)
    student = Student(*build_encoder(config, None, 0), pooling=pooling, max_length=max_length).eval()
    if head:
        student.add_head(8, head, seed=0)
    student.save(folder, dict(student.named_parameters()) | dict(student.named_buffers()))
    return student


def load(folder, **options):
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=False, **options)


@pytest.mark.parametrize("head", [None, "tanh", "linear"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler", "last4_mean", "first_last_mean"])
def test_every_pooling_with_every_head_exports_to_the_students_vectors(tiny_encoder, tmp_path, pooling, head):
    student = make_student(tmp_path / "student", tiny_encoder, pooling=pooling, head=head)
    export_student(tmp_path / "student", tmp_path / "export", card="# card\n", check_on=TEXTS)
    exported = load(tmp_path / "export")
    found = exported.encode(TEXTS)
    assert np.allclose(found, student.encode(TEXTS), atol=1e-5)
    assert exported.get_embedding_dimension() == student.dim and exported.similarity_fn_name == "cosine"
    assert exported.max_seq_length == 30
    assert (tmp_path / "export/README.md").read_text() == "# card\n"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "last4_mean"])
def test_every_family_exports(tiny_encoder, tmp_path, family, pooling):
    encoder = save_family(family, tiny_encoder, tmp_path / "base", layers=6)
    student = make_student(tmp_path / "student", encoder, pooling=pooling, layers=[5, 0, 1, 2, 3])
    export_student(tmp_path / "student", tmp_path / "export", card="", check_on=TEXTS)
    assert np.allclose(load(tmp_path / "export").encode(TEXTS), student.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_truncated_vectors_are_prefixes(tiny_encoder, tmp_path, size):
    student = make_student(tmp_path / "student", tiny_encoder, head="tanh")
    export_student(tmp_path / "student", tmp_path / "export", card="", check_on=TEXTS)
    prefix = student.encode(TEXTS)[:, :size]
    prefix = prefix / np.linalg.norm(prefix, axis=1, keepdims=True)
    found = load(tmp_path / "export", truncate_dim=size).encode(TEXTS, normalize_embeddings=True)
    assert found.shape == (len(TEXTS), size) and np.allclose(found, prefix, atol=1e-5)


def test_an_export_that_does_not_agree_leaves_nothing_and_the_last_one_as_it_was(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder, head="tanh")
    export_student(tmp_path / "student", tmp_path / "export", card="the last one", check_on=TEXTS)
    heads = load_file(tmp_path / "student/heads.safetensors")
    heads["head.0.bias"][3] = torch.nan
    save_file(heads, tmp_path / "student/heads.safetensors")
    for out in ("export", "other"):
        with pytest.raises(ValueError, match="does not agree with the student: worst cosine nan"):
            export_student(tmp_path / "student", tmp_path / out, card="the next one", check_on=TEXTS)
    assert (tmp_path / "export/README.md").read_text() == "the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "student"]


def test_what_a_killed_export_left_is_replaced(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder)
    (tmp_path / "export.part").mkdir()
    (tmp_path / "export.part/junk").touch()
    export_student(tmp_path / "student", tmp_path / "export", card="", check_on=TEXTS)
    assert not (tmp_path / "export.part").exists() and not (tmp_path / "export/junk").exists()


def test_nothing_in_an_export_is_a_pickle(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder, pooling="last4_mean", head="tanh")
    export_student(tmp_path / "student", tmp_path / "export", card="", check_on=TEXTS)
    assert not [path for path in (tmp_path / "export").rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".py"}]


@pytest.mark.parametrize(
    "pooling, depth, expected",
    [
        ("last4_mean", 6, [0, 0, 1, 1, 1, 1]),
        ("last4_mean", 3, [1, 1, 1]),
        ("first_last_mean", 4, [1, 0, 0, 1]),
        ("first_last_mean", 1, [1]),
    ],
)
def test_layers_weigh_what_the_pooling_says(pooling, depth, expected):
    assert layer_weights(pooling, depth).tolist() == expected
