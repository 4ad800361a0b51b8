"""The initial encoder of a student: layers in the chosen order, new weights that depend only on the seed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import sentences
from encoders import FAMILIES, POSITIONS, ROTARY, encoder_and_tokenizer, make_family, save_family
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from distill.student import Student
from distill.student.encoder import keep_layers, load_encoder, set_cpu_attention, set_dropout
from distill.student.student_config import StudentConfig

STACK = {"bert": "encoder.layer", "roberta": "encoder.layer", "mpnet": "encoder.layer", "distilbert": "transformer.layer",
         "t5": "encoder.block"}  # fmt: skip


def layer_states(encoder, family):
    return [
        {name: value for name, value in layer.state_dict().items() if "relative_attention_bias" not in name}
        for layer in encoder.get_submodule(STACK[family])
    ]


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_keep_their_weights_and_their_order(family, depth):
    whole = make_family(family, layers=depth)
    before = [{name: value.clone() for name, value in state.items()} for state in layer_states(whole, family)]
    chosen = [depth - 1, 0]
    keep_layers(whole, chosen)
    after = layer_states(whole, family)
    assert len(after) == 2 and whole.config.num_hidden_layers == 2
    for state, index in zip(after, chosen, strict=True):
        assert state.keys() == before[index].keys()
        assert all(torch.equal(state[name], before[index][name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_layers_changes_no_vector_and_the_folder_says_how_many_there_are(family, tiny_encoder, tmp_path):
    folder = save_family(family, tiny_encoder, tmp_path / "whole", layers=4)
    tokens = {"input_ids": torch.randint(5, 100, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    everything, _ = encoder_and_tokenizer(StudentConfig(init=str(folder), layers=[0, 1, 2, 3]), None, 0)
    expected = load_encoder(str(folder)).eval()(**tokens).last_hidden_state
    assert torch.equal(everything.eval()(**tokens).last_hidden_state, expected)
    some, tokenizer = encoder_and_tokenizer(StudentConfig(init=str(folder), layers=[3, 1]), None, 0)
    some.eval().save_pretrained(tmp_path / "some")
    tokenizer.save_pretrained(tmp_path / "some")
    again = load_encoder(str(tmp_path / "some")).eval()
    assert torch.equal(again(**tokens).last_hidden_state, some(**tokens).last_hidden_state)
    assert len(again.get_submodule(STACK[family])) == 2


def test_t5_gives_its_relative_bias_to_the_new_first_layer():
    encoder = make_family("t5", layers=3)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.clone()
    keep_layers(encoder, [2, 1])
    first = encoder.encoder.block[0].layer[0].SelfAttention
    assert first.has_relative_attention_bias and torch.equal(first.relative_attention_bias.weight, bias)
    tokens = {"input_ids": torch.arange(5, 13)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    swapped = {"input_ids": tokens["input_ids"].flip(1), "attention_mask": tokens["attention_mask"]}
    forward, backward = (encoder(**t).last_hidden_state.mean(dim=1) for t in (tokens, swapped))
    assert not torch.allclose(forward, backward, atol=1e-3), "without the bias, word order would not count"


def saved_and_loaded(student, folder):
    student.save(folder, student.state_dict())
    return Student.load(folder).eval()


@pytest.mark.parametrize("layers", [[0, 2], [0, 3, 1]])
@pytest.mark.parametrize("family", ROTARY)
def test_a_student_of_some_layers_of_a_decoder_encodes_and_gives_the_same_vectors_after_it_was_loaded(
    family, layers, tiny_encoder, tmp_path
):
    config = StudentConfig(init=str(save_family(family, tiny_encoder, tmp_path / "whole", layers=4)), layers=layers)
    student = Student(*encoder_and_tokenizer(config, None, 0), pooling="mean", max_length=32).eval()
    vectors = student.encode(sentences(5))  # with a cache of keys and values, the second of two layers is the third's
    loaded = saved_and_loaded(student, tmp_path / "student")
    assert torch.equal(torch.from_numpy(loaded.encode(sentences(5))), torch.from_numpy(vectors))
    assert [layer.layer_idx for layer in student.encoder.modules() if hasattr(layer, "q_proj")] in ([], [*range(len(layers))])
    assert len(getattr(loaded.encoder.config, "layer_types", None) or layers) == len(layers)


def test_per_layer_settings_of_a_config_are_cut_with_the_layers():
    """Gemma 4 has wider heads in its layers of full attention, here the third and the last."""
    transformers = pytest.importorskip("transformers.models.gemma4")
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(
        **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        **{"intermediate_size": 32, "vocab_size": 99, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
        **{"pad_token_id": 0, "layer_types": kinds},
    )
    encoder = transformers.Gemma4TextModel(config).eval()
    encoder.config.mlp_layer_types = ["dense", "sparse", "other", "last"]
    keep_layers(encoder, [2, 0])
    assert encoder.config.layer_types == ["full_attention", "sliding_attention"]
    assert encoder.config.mlp_layer_types == ["other", "dense"]
    assert encoder.config.to_dict()["per_layer_config"] == {"0": {"head_dim": 16}}
    assert [layer.self_attn.head_dim for layer in transformers.Gemma4TextModel(encoder.config).layers] == [16, 8]


def test_layers_that_the_config_cannot_describe_are_refused_and_not_lost_when_the_student_is_loaded():
    with pytest.raises(ValueError, match=r"layers \[2, 1\]: a modernbert of these .* is layers\.0\.attn_norm\.weight\); begin"):
        keep_layers(make_family("modernbert", layers=3), [2, 1])


def copied(tiny_encoder, folder, **tokenizer_config):
    shutil.copytree(tiny_encoder, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    return StudentConfig(init=str(folder))


def test_a_tokenizer_without_a_padding_token_pads_with_another_special_token(tiny_encoder, tmp_path):
    config = copied(tiny_encoder, tmp_path / "model", pad_token=None)
    student = Student(*encoder_and_tokenizer(config, None, 0), pooling="mean", max_length=32).eval()
    assert student.tokenizer.pad_token == "[UNK]"
    vectors = student.encode(sentences(5))
    assert torch.equal(
        torch.from_numpy(saved_and_loaded(student, tmp_path / "s").encode(sentences(5))), torch.from_numpy(vectors)
    )
    config = copied(tiny_encoder, tmp_path / "none", pad_token=None, unk_token=None)
    with pytest.raises(
        ValueError, match=r"the tokenizer of \S+/none has none of pad_token, eos_token and unk_token; set pad_token"
    ):
        encoder_and_tokenizer(config, None, 0)


def test_a_tokenizer_with_more_tokens_than_the_encoder_has_embeddings_is_refused(tiny_encoder, tmp_path):
    config = copied(tiny_encoder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["onemore"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"/model has a token 104, but its encoder has embeddings for 104; name a model"):
        encoder_and_tokenizer(config, None, 0)


def write_modules(folder, kind, path):
    folder.mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"}]))
    return StudentConfig(init=str(folder))


def test_the_transformer_of_a_sentence_transformers_folder_is_the_student(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "model/0_Transformer")
    encoder, _ = encoder_and_tokenizer(write_modules(tmp_path / "model", "Transformer", "0_Transformer"), None, 0)
    expected = load_encoder(str(tiny_encoder)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())


def test_static_embeddings_are_refused_as_a_student(tmp_path):
    config = write_modules(tmp_path / "static", "StaticEmbedding", "")
    (tmp_path / "static/model.safetensors").touch()
    with pytest.raises(ValueError, match=r"^student\.init: \S+/static is no transformer"):
        encoder_and_tokenizer(config, None, 0)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"layers \[0, 3\]: the encoder has layers 0 to 2"):
        StudentConfig(layers=[0, 3]).kept(3)
    with pytest.raises(ValueError, match=r"layers 4: the encoder has 3"):
        StudentConfig(layers=4).kept(3)


def test_a_number_of_layers_is_spread_evenly_from_the_first_to_the_last():
    assert StudentConfig(layers=3).kept(6) == [0, 2, 5] and StudentConfig(layers=6).kept(12) == [0, 2, 4, 7, 9, 11]
    for depth in range(1, 25):
        for count in range(1, depth + 1):
            kept = StudentConfig(layers=count).kept(depth)
            assert len(set(kept)) == count and kept == sorted(kept) and kept[0] == 0 and kept[-1] == (count > 1) * (depth - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_depend_on_the_seed_alone(family, tiny_encoder, tmp_path):
    config = StudentConfig(init=str(save_family(family, tiny_encoder, tmp_path / "old")), from_scratch=True)
    states = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(noise)
        draws = torch.random.get_rng_state()
        states.append(encoder_and_tokenizer(config, None, seed)[0].state_dict())
        assert torch.equal(torch.random.get_rng_state(), draws)
    old = load_encoder(config.init).state_dict()
    name = next(name for name, value in old.items() if value.ndim == 2 and "embed" not in name and "relative" not in name)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name]) and not torch.equal(states[0][name], old[name])


def test_a_student_starts_from_teacher_model_by_default_and_without_one_is_an_error(tiny_encoder):
    ours, _ = encoder_and_tokenizer(StudentConfig(), str(tiny_encoder), 0)
    theirs = AutoModel.from_pretrained(tiny_encoder)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"no teacher\.model"):
        encoder_and_tokenizer(StudentConfig(), None, 0)


def without(tiny_encoder, folder, prefix):
    shutil.copytree(tiny_encoder, folder)
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if not name.startswith(prefix)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return StudentConfig(init=str(folder))


def test_missing_weights_are_never_initialised_at_random(tiny_encoder, tmp_path):
    config = without(tiny_encoder, tmp_path / "broken", "encoder.layer.1.")
    with pytest.raises(ValueError, match=r"no weights for 16 parts of its encoder, the first is encoder\.layer\.1\."):
        encoder_and_tokenizer(config, None, 0)


def test_missing_pooler_weights_are_an_error_only_with_pooler_pooling(tiny_encoder, tmp_path):
    config = without(tiny_encoder, tmp_path / "headless", "pooler.")
    encoder_and_tokenizer(config, None, 0)
    with pytest.raises(ValueError, match=r"no weights for 2 parts of its encoder, the first is pooler\."):
        encoder_and_tokenizer(config.model_copy(update={"pooling": "pooler"}), None, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_0_makes_training_mode_deterministic(family):
    tokens = {"input_ids": torch.randint(5, 100, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    encoder = make_family(family).train()
    assert not torch.equal(encoder(**tokens).last_hidden_state, encoder(**tokens).last_hidden_state)
    set_dropout(encoder, 0.0)
    once = encoder(**tokens).last_hidden_state
    assert torch.equal(once, encoder(**tokens).last_hidden_state)
    assert torch.equal(once, encoder.eval()(**tokens).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_from_input_embeddings_equal_those_from_token_ids(family, tiny_encoder, tmp_path):
    """A student looks up the tokens of all chunks at once; positions and masks must come out as usual."""
    encoder, tokenizer = encoder_and_tokenizer(
        StudentConfig(init=str(save_family(family, tiny_encoder, tmp_path / family))), None, 0
    )
    student = Student(encoder, tokenizer, pooling="mean", max_length=32).eval()
    tokens = student.tokenize(sentences(8))
    states = student.encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    assert torch.allclose(student(tokens), (states * mask).sum(1) / mask.sum(1), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sentence_fits_the_encoders_positions(family, tiny_encoder, tmp_path):
    encoder, tokenizer = encoder_and_tokenizer(
        StudentConfig(init=str(save_family(family, tiny_encoder, tmp_path / family))), None, 0
    )
    student = Student(encoder, tokenizer, pooling="mean", max_length=512).eval()
    assert student.max_length == (512 if family == "t5" else POSITIONS)
    tokens = student.tokenize(["a " * 1000])
    assert int(tokens["attention_mask"].sum()) == student.max_length
    assert torch.isfinite(student(tokens)).all()


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen2"])
def test_on_a_cpu_attention_is_eager_for_short_inputs_alone(family):
    encoder = make_family(family)
    for num_tokens, expected in ((1024, "eager"), (1025, "sdpa"), (8, "eager")):
        set_cpu_attention(encoder, num_tokens)
        assert encoder.config._attn_implementation == expected
