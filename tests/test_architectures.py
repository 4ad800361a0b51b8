"""Models of many architectures as teacher and as student, through every stage; the table is in tests/README.md.

The miniatures of DISTILL_MODELS/miniatures are models as their authors publish them: pooling, Dense, prompts, padding.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make_architecture
from conftest import sentences, write_pairs
from distributed_ranks import on_ranks
from engines import CPU, start_deepspeed, train_stage
from retrieval_sets import write_folder
from sentence_transformers import SentenceTransformer
from students import export
from transformers import FNetConfig, FNetModel

from distill.config import load_config, stage_of
from distill.corpus import text_hash
from distill.doctor.preflight import problems
from distill.export.onnx import TESTED
from distill.run.files import read_json
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_pad_token
from distill.student.initial import build_student
from distill.student.student_config import StudentConfig

TEXTS = [*sentences(250), "In CAPITALS", "a tree of keys " * 12]
PROMPT = "note: "
REFUSED = {
    "splade": "is a SparseEncoder, no model that gives a text one dense vector: name a dense one",
    "cross-encoder": "is a CrossEncoder or classifier, which scores texts, no model",
    "lora": "is a LoRA adapter without its base model, no model that gives a text one dense vector: merge it",
    "gguf": "is a GGUF model of llama.cpp, no model that gives a text one dense vector: name the model in safetensors",
    "bin-only": "it has pytorch_model.bin, a pickle; convert it to safetensors",
    "remote-code": "needs code of its own (configuration.NewConfig), which is not run",
}
SAME = {"qwen3-nopad", "qwen3-cache", "nomic-modernbert", "labse", "cased-lower"}  # as another, to ONNX
FEW = {"electra", "gpt2", "longformer"}  # of ARCHITECTURES, in CI
MINIATURES = Path(os.environ.get("DISTILL_MODELS", ".")) / "miniatures"
NAMES = sorted(folder.name for folder in MINIATURES.iterdir()) if MINIATURES.is_dir() else []
SMALL = [name for name in NAMES if name not in {*REFUSED, "static", "albert", "minilm-cls", "minilm-prompts"}]
needs_miniatures = pytest.mark.skipif(not NAMES, reason="DISTILL_MODELS has no miniatures")


def write_run(folder: Path, model: Path) -> Path:
    """A run of a few steps through every stage but the fine-tuning ones."""
    (folder / "text.txt").write_text("\n".join(TEXTS) + "\n")
    for name in ("sts12_test", "stsb_dev"):
        write_pairs(folder / "sts", name, 30)
    write_folder(folder / "retrieval", "1\t1\t1\n2\t2\t1\n")
    config = folder / "run.yaml"
    config.write_text(f"""
name: run
runs_dir: {folder / "runs"}
text: {{sources: [{folder / "text.txt"}], held_out: 40}}
teacher: {{model: {model}, prompt: "{PROMPT}", precision: fp32}}
student: {{layers: 3}}
ckd: {{global_batch: 32, micro_batch: 16, queue: 64, max_steps: 3}}
hpd: {{init: ckd, dim: 8, nested: [], global_batch: 32, micro_batch: 16, max_steps: 3}}
engine: {{precision: fp32}}
evaluate: {{sts: {folder / "sts"}, retrieval: [{folder / "retrieval"}], dev_sentences: 20}}
stages: [precompute, ckd, hpd, export, evaluate]
""")
    return config


def run_stages(path: Path) -> None:
    start_deepspeed()
    config = load_config(path)
    assert not problems(config)
    for name in config.stages:
        stage_of(config, name).run(CPU)


def reference(model: Path, texts: list[str], prompt: str) -> np.ndarray:
    """sentence-transformers' vectors, one text at a time, in float32."""
    loaded = SentenceTransformer(str(model), device="cpu", model_kwargs={"dtype": torch.float32})
    if loaded.tokenizer is not None and hasattr(loaded.tokenizer, "eos_token"):
        set_pad_token(loaded.tokenizer)
    return loaded.encode(texts, prompt=prompt, batch_size=1, normalize_embeddings=True, show_progress_bar=False)


def lowest_cosine(first: np.ndarray, second: np.ndarray) -> float:
    first, second = (each / np.linalg.norm(each.astype(np.float64), axis=1, keepdims=True) for each in (first, second))
    return float((first * second).sum(axis=1).min())


def check_teacher(config: Path, model: Path) -> None:
    reader = ShardReader(load_config(config).shards_dir)
    rows = np.arange(60)
    expected = reference(model, reader.texts(rows), PROMPT)
    assert lowest_cosine(reader.vectors(rows), expected) > 0.99999


def check_chain(folder: Path, model: Path, *, onnx: bool) -> None:
    config = write_run(folder, model)
    on_ranks(1, run_stages, config)
    check_teacher(config, model)
    loaded = load_config(config)
    for stage in ("ckd", "hpd"):
        student = Student.load(loaded.run_dir / stage / "student").eval()
        assert student.encoder.config.num_hidden_layers == 3
        exported = SentenceTransformer(str(loaded.run_dir / "export" / stage), device="cpu")
        for role in ("query", "document"):
            expected = student.encode(TEXTS, roles=[role] * len(TEXTS))
            encode: Any = exported.encode_query if role == "query" else exported.encode_document
            assert lowest_cosine(encode(TEXTS, show_progress_bar=False), expected) > 0.99999
    results = read_json(loaded.run_dir / "evaluate/results.json")
    assert results is not None and {"teacher", "ckd", "hpd"} <= results.keys()
    if onnx:  # of one student: writing a graph takes longer than all stages
        assert student.encoder.config.model_type in TESTED, "add it there: it is compared here"
        agreements = export(loaded.run_dir / "hpd/student", folder / "onnx", "onnx", texts=TEXTS[-30:])
        assert agreements["onnx"].worst > 0.9999


def check_copy(model: Path) -> None:
    """An untrained student with all layers has the vectors of the model that it is a copy of, with each of its prompts."""
    student = build_student(copy_of(model), None, 0).eval()
    texts = TEXTS[-40:]
    for role in (None, "query", "document"):
        expected = reference(model, texts, student.prompt(role))
        assert lowest_cosine(student.encode(texts, roles=[role] * len(texts)), expected) > 0.99999


def copy_of(model: Path, **changes: Any) -> StudentConfig:
    return StudentConfig(init=str(model), **changes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_untrained_copy_has_the_vectors_of_its_model(name, tiny_encoder, tmp_path):
    check_copy(make_architecture(name, tiny_encoder, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.soak) for name in ARCHITECTURES]
)
def test_three_layers_go_through_every_stage(name, tiny_encoder, tmp_path):
    model = make_architecture(name, tiny_encoder, tmp_path)
    check_chain(tmp_path, model, onnx=name != "longformer")


@pytest.mark.slow
@needs_miniatures
@pytest.mark.parametrize("name", SMALL)
def test_a_miniature_goes_through_every_stage(name, tmp_path):
    check_copy(MINIATURES / name)
    check_chain(tmp_path, MINIATURES / name, onnx=name not in SAME)


@needs_miniatures
@pytest.mark.parametrize(
    "name", ["bge", "modernbert", "xlmr", "gemma3"]
)  # WordPiece, byte-level BPE, Unigram, BPE of SentencePiece
def test_code_tables_and_line_breaks_reach_the_teacher_and_the_student_as_they_are(name, tmp_path):
    names = sentences(200)
    texts = [f"def f{n}(x):\n\tif x:\n\t\treturn {n}  # {text}\n" for n, text in enumerate(names[:100])]
    texts += [f"| no |  {n}|\r\n|---|---|\n  {text}\u200b\u2028 e\u0301" for n, text in enumerate(names[100:])]
    config = write_run(tmp_path, MINIATURES / name)
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = f"text.sources=[{{type: file, path: {tmp_path / 'raw.jsonl'}, field: text}}]"
    loaded = load_config(config, [sources, "text.held_out=0", "stages=[precompute]"])
    assert stage_of(loaded, "precompute").run(CPU)
    reader = ShardReader(loaded.shards_dir)
    rows = np.arange(len(reader))
    assert set(reader.texts(rows)) == {text for text in texts if text_hash(text) % 2**64 % 50}
    assert lowest_cosine(reader.vectors(rows), reference(MINIATURES / name, reader.texts(rows), PROMPT)) > 0.99999
    student = build_student(copy_of(MINIATURES / name), None, 0).eval()
    assert lowest_cosine(student.encode(texts), reference(MINIATURES / name, texts, "")) > 0.99999


@needs_miniatures
@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_dense_model_is_refused_by_what_it_is(name, tmp_path):
    (found,) = problems(load_config(write_run(tmp_path, MINIATURES / name)))
    assert REFUSED[name] in str(found) and str(MINIATURES / name) in str(found)


@needs_miniatures
def test_a_static_model_is_a_teacher_but_no_student(tmp_path, tiny_encoder):
    config = write_run(tmp_path, MINIATURES / "static")
    assert "is no transformer; name an encoder with layers in student.init" in str(problems(load_config(config))[0])
    overrides = [f"student.init={tiny_encoder}", "student.layers=null", "stages=[precompute]"]
    assert stage_of(load_config(config, overrides), "precompute").run(CPU)
    check_teacher(config, MINIATURES / "static")


@needs_miniatures
def test_layers_that_are_one_layer_repeated_are_not_chosen_from(tmp_path):
    check_copy(MINIATURES / "albert")
    (found,) = problems(load_config(write_run(tmp_path, MINIATURES / "albert")))
    assert str(found) == ("student.layers: a albert has 0 lists of 6 layers, not one; leave it out, or name another encoder")


def test_an_encoder_that_mixes_padding_into_its_vectors_is_refused(tiny_encoder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 120}
    folder = tmp_path / "fnet"
    FNetModel(FNetConfig(**sizes)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_encoder / file).read_bytes())
    with pytest.raises(ValueError, match="the vectors of a fnet depend on the padding, and so on the texts beside a text"):
        build_student(copy_of(folder), None, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_decoder_attends_in_both_directions_if_the_config_says_so(attention, tiny_encoder, tmp_path):
    model = make_architecture("mistral", tiny_encoder, tmp_path)
    changed = {}
    for is_causal in (None, False):
        student = build_student(copy_of(model, is_causal=is_causal), None, 0).eval()
        (tmp_path / str(is_causal)).mkdir()
        student.save(tmp_path / str(is_causal), student.state_dict())
        loaded = Student.load(tmp_path / str(is_causal)).eval()
        loaded.encoder.set_attn_implementation(attention)
        states = [
            loaded.encoder(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 3, dtype=torch.int64)).last_hidden_state
            for ids in ([5, 6, 7], [5, 6, 8])
        ]
        changed[is_causal] = not torch.allclose(states[0][0, 0], states[1][0, 0])
    assert changed == {None: False, False: True}


def test_an_architecture_padded_on_the_left_keeps_its_side_where_positions_are_relative(tiny_encoder, tmp_path):
    sides = {}
    for name in ("mistral", "gpt2"):
        student = build_student(copy_of(make_architecture(name, tiny_encoder, tmp_path / name)), None, 0)
        sides[name] = student.tokenizer.padding_side
    assert sides == {"mistral": "left", "gpt2": "right"}


@pytest.mark.slow
def test_dense_layers_are_trained_and_frozen_alike_under_every_zero_stage(tiny_encoder, tmp_path):
    model = make_architecture("mistral", tiny_encoder, tmp_path)
    config = write_run(tmp_path, model)
    config.write_text(config.read_text().replace("held_out: 40", "held_out: 0"))  # without a dev set, the last student is kept
    loaded = load_config(config)
    assert stage_of(loaded, "precompute").run(CPU)
    before = build_student(copy_of(model), None, 0).dense[0].linear.weight
    found = []
    for ranks, engine in ((1, "zero0"), (2, "zero3")):
        overrides = [f"name={engine}", "shards_from=run", f"engine.deepspeed=configs/deepspeed/{engine}.json", "ckd.lr=1e-2"]
        for stage in ("ckd", "hpd"):
            on_ranks(ranks, train_stage, config, stage, [*overrides, "hpd.freeze_encoder=true"])
        trained, frozen = (
            Student.load(tmp_path / "runs" / engine / stage / "student").dense[0].linear.weight for stage in ("ckd", "hpd")
        )
        assert (trained - before).abs().max() > 0.01 and torch.equal(trained, frozen)
        found.append(trained)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
