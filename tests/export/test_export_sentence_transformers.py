"""A sentence-transformers folder gives the student's vectors, whatever the pooling and the head."""

from __future__ import annotations

import json
import typing

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from students import MAX_LENGTH, TEXTS, cosines, export, make_student
from tokenizers import Tokenizer

from distill.export.sentence_transformers import TOKEN_POOLING, check_pooling, layer_weights
from distill.student.student_config import Pooling


def load(folder, **options):
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=False, **options)


@pytest.mark.parametrize(
    "pooling, head",
    [*((pooling, "tanh") for pooling in TOKEN_POOLING), ("mean", None), ("last4_mean", "linear")],
)
def test_every_pooling_exports_to_the_students_vectors(tiny_encoder, tmp_path, pooling, head):
    student = make_student(tmp_path / "student", tiny_encoder, pooling=pooling, head=head)
    export(tmp_path / "student", tmp_path / "export")
    exported = load(tmp_path / "export")
    assert np.allclose(exported.encode(TEXTS), student.encode(TEXTS), atol=1e-5)
    assert exported.get_embedding_dimension() == student.dim
    assert exported.max_seq_length == MAX_LENGTH


def test_a_pooling_without_a_module_is_refused_by_name_before_anything_is_written(tiny_encoder, tmp_path):
    unknown = set(typing.get_args(Pooling)) - set(TOKEN_POOLING)
    assert unknown == {"concat_last4_mean"}
    for pooling in unknown:
        with pytest.raises(ValueError, match=f"{pooling} cannot be exported: sentence-transformers has no module"):
            check_pooling(pooling)
    make_student(tmp_path / "student", tiny_encoder, pooling="concat_last4_mean")
    with pytest.raises(ValueError, match="concat_last4_mean"):
        export(tmp_path / "student", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_truncated_vectors_are_prefixes_of_the_students(tiny_encoder, tmp_path):
    """sentence-transformers leaves a prefix as long as it is, which no cosine sees, and normalises it where asked."""
    student = make_student(tmp_path / "student", tiny_encoder, head="tanh")
    export(tmp_path / "student", tmp_path / "export")
    full = student.encode(TEXTS, normalize=False)
    for size in (4, 7):
        small = load(tmp_path / "export", truncate_dim=size)
        found, unit = small.encode(TEXTS), small.encode(TEXTS, normalize_embeddings=True)
        assert found.shape == (len(TEXTS), size)
        assert np.allclose(cosines(found, full[:, :size]), 1, atol=1e-5)
        assert np.allclose(small.similarity(found[:5], found).numpy(), unit[:5] @ unit.T, atol=1e-5)
        assert np.allclose(unit, full[:, :size] / np.linalg.norm(full[:, :size], axis=1, keepdims=True), atol=1e-5)


def test_similarity_is_the_cosine_and_no_prompt_is_put_before_a_text(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder)
    export(tmp_path / "student", tmp_path / "export")
    config = json.loads((tmp_path / "export/config_sentence_transformers.json").read_text())
    assert config["similarity_fn_name"] == "cosine" and config["default_prompt_name"] is None
    assert config["prompts"] == {"query": "", "document": ""}
    exported = load(tmp_path / "export")
    for encode in (exported.encode_query, exported.encode_document):
        assert np.array_equal(encode(TEXTS), exported.encode(TEXTS))


def test_the_stored_tokenizer_truncates_and_pads_on_its_own_as_the_student(tiny_encoder, tmp_path):
    student = make_student(tmp_path / "student", tiny_encoder)
    export(tmp_path / "student", tmp_path / "export")
    found = Tokenizer.from_file(str(tmp_path / "export/tokenizer.json")).encode_batch(TEXTS)
    expected = student.token_ids(TEXTS)
    assert max(map(len, expected)) == MAX_LENGTH
    assert {len(each.ids) for each in found} == {MAX_LENGTH}
    assert [each.ids[: sum(each.attention_mask)] for each in found] == expected
    assert all(set(each.ids[sum(each.attention_mask) :]) <= {student.tokenizer.pad_token_id} for each in found)


@pytest.mark.parametrize(
    "pooling, depth, expected",
    [
        ("last4_mean", 6, [0, 0, 1, 1, 1, 1]),
        ("last4_max", 3, [1, 1, 1]),
        ("last2_mean", 3, [0, 1, 1]),
        ("all_mean", 3, [1, 1, 1]),
        ("first_last_mean", 4, [1, 0, 0, 1]),
        ("first_last_mean", 1, [1]),
    ],
)
def test_layers_weigh_what_the_pooling_says(pooling, depth, expected):
    assert layer_weights(pooling, depth).tolist() == expected
