"""The teacher's vectors are those that sentence-transformers itself gives, in the order of the texts."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import make_encoder, sentences
from encoders import save_sentence_transformer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from distill.corpus import TextChunk
from distill.plan.architectures import architecture_of
from distill.teacher.encoder import Teacher, evaluation_dtype
from distill.teacher.teacher_config import TeacherConfig

CPU = torch.device("cpu")


def vectors_of(texts, **config):
    return Teacher(TeacherConfig(**config), CPU, None)(texts)


def worst_cosine(a, b):
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.mark.parametrize("max_length", [None, 16])
def test_a_sentence_transformers_folder_encodes_as_sentence_transformers_does(minilm, max_length):
    texts = ["A short one.", "How do I gather a tensor from all ranks, " * 20, "Ä ümlaut, 漢字 and 🙂.", *sentences(5)]
    model = SentenceTransformer(minilm, device="cpu")
    model.max_seq_length = max_length or model.max_seq_length
    found = vectors_of(texts, model=minilm, max_length=max_length, tokens_per_batch=300)
    assert worst_cosine(found, model.encode(texts)) > 0.9999
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_a_plain_encoder_pools_as_configured(tiny_encoder, pooling):
    texts = sentences(20)
    tokens = AutoTokenizer.from_pretrained(tiny_encoder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(tiny_encoder).eval()(**tokens)
    mask = tokens["attention_mask"][:, :, None]
    expected = {
        "cls": output.last_hidden_state[:, 0],
        "mean": (output.last_hidden_state * mask).sum(1) / mask.sum(1),
        "pooler": output.pooler_output,
    }[pooling]
    assert worst_cosine(vectors_of(texts, model=str(tiny_encoder), pooling=pooling), expected.numpy()) > 0.9999


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_plain_encoder_encodes_as_sentence_transformers_does(tiny_encoder, pooling):
    texts = sentences(20)
    transformer = Transformer(str(tiny_encoder))
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode=pooling)], device="cpu")
    assert worst_cosine(vectors_of(texts, model=str(tiny_encoder), pooling=pooling), model.encode(texts)) > 0.9999


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 8192])
def test_vectors_come_back_in_order_whatever_a_batch_holds(tiny_encoder, tokens_per_batch):
    texts = sentences(40)
    config = {"model": str(tiny_encoder), "pooling": "mean"}
    found = vectors_of(texts, **config, tokens_per_batch=tokens_per_batch)
    alone = np.concatenate([vectors_of([text], **config) for text in texts[:3]])
    assert found.shape == (40, 32)
    assert np.allclose(found[:3], alone, atol=2e-3)
    assert np.allclose(found[::-1], vectors_of(texts[::-1], **config), atol=2e-3)
    assert worst_cosine(found[:1], found[1:2]) < 0.999, "the sentences are too alike for their order to show"


def test_a_prompt_is_put_before_every_text(tiny_encoder):
    config = {"model": str(tiny_encoder), "pooling": "mean"}
    prompted = vectors_of(["the model learns."], **config, prompt="query vector ")
    assert np.array_equal(prompted, vectors_of(["query vector the model learns."], **config))
    assert not np.array_equal(prompted, vectors_of(["the model learns."], **config))


def test_what_lies_beyond_max_length_does_not_count(tiny_encoder):
    config = {"model": str(tiny_encoder), "pooling": "mean"}
    long, longer = "the model reads a tensor", "the model reads a tensor from a queue of keys"
    assert np.array_equal(vectors_of([long], **config, max_length=6), vectors_of([longer], **config, max_length=6))
    assert not np.array_equal(vectors_of([long], **config), vectors_of([longer], **config))


def test_the_models_own_truncate_dim_cuts_the_vectors_before_they_are_normalised(tiny_encoder, tmp_path):
    texts = sentences(5)
    folder = str(save_sentence_transformer(tiny_encoder, tmp_path / "short", truncate_dim=12))
    expected = SentenceTransformer(folder, device="cpu").encode(texts, normalize_embeddings=True)
    teacher = Teacher(TeacherConfig(model=folder, concat=[{"model": str(tiny_encoder), "pooling": "mean"}]), CPU, None)
    assert expected.shape == (5, 12) and np.allclose(vectors_of(texts, model=folder), expected, atol=1e-3)
    assert teacher.dim == 12 + 32 and architecture_of(folder).dim == 12


@pytest.mark.parametrize(
    ("precision", "has", "dtype"),
    [("bf16", True, "bfloat16"), ("bf16", False, "float32"), ("fp32", True, "float32"), ("auto", True, "bfloat16")],
)
def test_evaluation_runs_in_the_configured_precision_where_the_device_has_it(monkeypatch, tiny_encoder, precision, has, dtype):
    monkeypatch.setattr("distill.run.precision.has_bf16", lambda device: has)
    config = TeacherConfig(model=str(tiny_encoder), pooling="mean", precision=precision)
    assert Teacher(config, CPU, evaluation_dtype(config, CPU)).dtype == dtype


def test_a_plain_encoder_must_say_how_it_pools(tiny_encoder):
    with pytest.raises(ValueError, match=r"plain encoder .* teacher\.pooling=cls\|pooler\|mean"):
        vectors_of(["a"], model=str(tiny_encoder))


def test_a_length_that_the_encoder_has_no_positions_for_is_refused(tiny_encoder):
    with pytest.raises(ValueError, match=r"teacher\.max_length 65 is above the 64 positions"):
        vectors_of(["a"], model=str(tiny_encoder), pooling="mean", max_length=65)


def test_a_pooler_without_weights_is_refused_and_never_initialised_at_random(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "headless")
    file = tmp_path / "headless/model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("pooler.")}, file, metadata={"format": "pt"})
    assert vectors_of(["a"], model=str(tmp_path / "headless"), pooling="cls").shape == (1, 32)
    with pytest.raises(ValueError, match="no weights for 2 parts of its encoder, the first is pooler"):
        vectors_of(["a"], model=str(tmp_path / "headless"), pooling="pooler")


def test_the_same_texts_give_the_same_bytes(tmp_path):
    encoder = make_encoder(tmp_path / "e", seed=5)
    config = TeacherConfig(model=str(encoder), pooling="pooler", tokens_per_batch=100)
    teachers = Teacher(config, CPU, None), Teacher(config, CPU, None)
    first, second = (teacher.encode(teacher.read(TextChunk(sentences(30), None, None))) for teacher in teachers)
    assert first.dtype == np.float16 and first.tobytes() == second.tobytes()


@pytest.fixture
def teacher_of_little_memory(tiny_encoder, monkeypatch):
    """Makes a teacher whose device has memory for batches of some number of tokens, and the sizes that it has tried."""

    def make(fitting: int, tokens_per_batch: int = 512):
        teacher = Teacher(TeacherConfig(model=str(tiny_encoder), pooling="mean", tokens_per_batch=tokens_per_batch), CPU, None)
        forward, tried = teacher.encoders[0]._forward, []

        def limited(features):
            tried.append(features["input_ids"].numel())
            if tried[-1] > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(features)

        monkeypatch.setattr(teacher.encoders[0], "_forward", limited)
        return teacher, tried

    return make


def test_a_batch_beyond_the_memory_is_halved_and_so_are_later_ones(tiny_encoder, teacher_of_little_memory, caplog):
    texts = sentences(100)
    teacher, tried = teacher_of_little_memory(fitting=200)
    found = teacher(texts)
    assert worst_cosine(found, vectors_of(texts, model=str(tiny_encoder), pooling="mean")) > 0.9999
    failed = [size for size in tried if size > 200]
    assert 1 <= len(failed) <= 3 and tried.index(failed[-1]) < 4, "only the first batch is tried in vain"
    assert f"teacher.tokens_per_batch is {teacher.encoders[0].tokens_per_batch} from here on" in caplog.text
    tried.clear()
    teacher(texts)
    assert max(tried) <= 200


def test_one_text_beyond_the_memory_is_an_error_that_names_what_to_lower(teacher_of_little_memory):
    teacher, _ = teacher_of_little_memory(fitting=2)
    with pytest.raises(ValueError, match=r"out of memory on cpu with a batch of 1 x \d+ tokens: lower teacher.max_length"):
        teacher(["a sentence that has more than two tokens"])
