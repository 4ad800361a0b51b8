import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_times import hang_limit
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

from distill.evaluation.model_encoder import ModelEncoder, encoder_of, throughput

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A sentence-transformers folder: a random BERT of width 32 over letters."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS)])
    )
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "plain")
    config = BertConfig(vocab_size=57, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder / "plain")
    encoder = Transformer(str(folder / "plain"), max_seq_length=32)
    SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def test_vectors_come_in_the_callers_order_and_do_not_depend_on_the_batch(tiny):
    encode = encoder_of(tiny, batch_size=2, device="cpu")
    texts = ["a", "long words of many letters", "b c", "a", "zz"]
    together = encode(texts)
    assert together.shape == (5, encode.dim)
    assert together.dtype == np.float32
    assert together == pytest.approx(np.concatenate([encode([text]) for text in texts]), abs=1e-6)
    assert (together[0] == together[3]).all()
    assert encode([]).shape == (0, encode.dim)


def test_an_encoder_knows_its_width_and_size(tiny):
    encode = encoder_of(str(tiny), device="cpu")
    assert encode.dim == 32
    assert encode.params == sum(parameter.numel() for parameter in SentenceTransformer(str(tiny), device="cpu").parameters())


def test_truncated_vectors_are_the_first_dimensions(tiny):
    whole, part = encoder_of(tiny, device="cpu"), encoder_of(tiny, device="cpu", truncate_dim=8)
    assert (whole.dim, part.dim) == (32, 8)
    assert part(["abc"]) == pytest.approx(whole(["abc"])[:, :8])
    with pytest.raises(ValueError, match="truncate_dim 33 is more than the 32 dimensions"):
        encoder_of(tiny, device="cpu", truncate_dim=33)


def test_a_models_own_truncate_dim_is_kept_unless_another_is_given(tiny, tmp_path):
    SentenceTransformer(str(tiny), device="cpu", truncate_dim=12).save(str(tmp_path / "short"))
    whole, short = encoder_of(tiny, device="cpu"), encoder_of(tmp_path / "short", device="cpu")
    assert short.dim == 12 and short(["abc"]) == pytest.approx(whole(["abc"])[:, :12])
    assert [encoder_of(tmp_path / "short", device="cpu", truncate_dim=size).dim for size in (4, 20)] == [4, 20]
    with pytest.raises(ValueError, match="truncate_dim 33 is more than the 32 dimensions"):
        encoder_of(tmp_path / "short", device="cpu", truncate_dim=33)


def test_an_encoder_names_the_type_that_it_runs_in(tiny, tmp_path):
    SentenceTransformer(str(tiny), device="cpu").to(torch.bfloat16).save(str(tmp_path / "half"))
    assert [encoder_of(folder, device="cpu").dtype for folder in (tiny, tmp_path / "half")] == ["float32", "bfloat16"]


def test_a_model_that_gives_nan_is_refused(tiny):
    model = SentenceTransformer(str(tiny), device="cpu")
    encode = ModelEncoder(model)
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite, first for 'abc'"):
        encode(["abc"])


def test_the_error_for_a_path_without_a_model_names_what_is_missing(tmp_path):
    for name in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"config\.json|no such folder"):
            encoder_of(name)


def test_truncated_weights_are_refused(tiny, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken does not load"):
        encoder_of(broken, device="cpu")


def test_a_layer_without_weights_is_refused(tiny, tmp_path):
    lacking = shutil.copytree(tiny, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "intermediate" not in name}, lacking / "model.safetensors")
    with pytest.raises(ValueError, match="has no weights for 2 parts of its encoder"):
        encoder_of(lacking, device="cpu")


@pytest.mark.slow
def test_a_hub_name_without_a_network_is_refused_at_once():
    code = "from distill.evaluation.model_encoder import encoder_of\nencoder_of('nobody/nothing', device='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=hang_limit(),
    )
    assert "ValueError: no model nobody/nothing: there is no such folder, and the hub cannot be reached" in done.stderr


def test_throughput_counts_what_was_encoded_after_the_warm_up():
    calls = []
    rate = throughput(lambda texts: calls.append(len(texts)), [str(i) for i in range(300)] * 2, seconds=0.05)
    assert calls[:4] == [256, 256, 44, 256]
    assert rate > 0
