"""How a stage begins and ends: its inputs, its modules' mode, dropout that a stop does not change, its cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_encoder, write_config
from distributed_ranks import on_ranks
from engines import embed_text, train_stage
from safetensors.torch import load_file
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from distill.config import load_config, stage_of
from distill.doctor.preflight import problems
from distill.run.files import write_json
from distill.run.hub import model_commit
from distill.run.stopping import Stopped
from distill.student.fingerprint import student_fingerprint
from distill.training.dashboard import PARTS, describe_run
from distill.training.loop import Trainer
from distill.training.tasks.ckd import CkdStage

SIMCSE = ("simcse.global_batch=16", "simcse.micro_batch=16", "simcse.max_steps=4", "simcse.dropout=0.3",
          "simcse.lr=1e-3", "simcse.dev_every=100", "engine.precision=fp32")  # fmt: skip


@pytest.mark.parametrize("name", ["ckd", "simcse"])
def test_every_module_is_in_training_mode_from_the_first_step(embedded_copy, name):
    stage = stage_of(load_config(embedded_copy[0]), name)
    task = stage.build(stage.setup(torch.device("cpu"), None))
    assert all(module.training for module in task.module.modules())


def train_without_memory(config, owner, method, *overrides) -> str:
    def run(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    setattr(owner, method, run)
    with pytest.raises(ValueError) as error:
        train_stage(config, "ckd", overrides)
    return str(error.value)


def test_out_of_memory_names_a_smaller_micro_batch(embedded_copy):
    (message,) = on_ranks(1, train_without_memory, embedded_copy[0], Trainer, "run")
    assert message.startswith("ckd: out of device memory with ckd.micro_batch 8: set ckd.micro_batch=4, engine.")
    (message,) = on_ranks(1, train_without_memory, embedded_copy[0], CkdStage, "build", "ckd.micro_batch=1")
    assert message.startswith("ckd: out of device memory with ckd.micro_batch 1: engine.activation_checkpointing=true")
    (message,) = on_ranks(1, train_without_memory, embedded_copy[0], CkdStage, "build", "ckd.tokens_per_batch=900")
    assert message.startswith("ckd: out of device memory with ckd.tokens_per_batch 900: set ckd.tokens_per_batch=450, engine.")


@pytest.mark.parametrize("name", ["ckd", "simcse"])
def test_texts_that_fill_no_global_batch_are_counted_in_the_log(embedded_copy, caplog, name):
    stage = stage_of(load_config(embedded_copy[0], [f"{name}.global_batch=100"]), name)
    caplog.set_level(logging.INFO, "distill")
    setup = stage.setup(torch.device("cpu"), None)
    stage.build(setup)
    texts = len(setup.reader)
    assert f"{texts % 100} of {texts} texts are left out of each epoch: they do not fill a global batch of 100" in caplog.text


def test_texts_that_the_student_cuts_and_the_teacher_reads_on_are_counted_in_the_log(embedded_copy, caplog):
    caplog.set_level(logging.INFO, "distill")

    def setup(*overrides):
        caplog.clear()
        return stage_of(load_config(embedded_copy[0], list(overrides)), "ckd").setup(torch.device("cpu"), None).reader

    reader = setup("student.max_length=8")
    texts = reader.texts(range(len(reader)))
    num_tokens = [len(text.split()) + 3 for text in texts]  # [CLS], ., [SEP]
    shown = f"{100 * sum(num > 8 for num in num_tokens) / len(texts):.1f}% of the texts (of {len(texts)} sampled)"
    assert f"ckd: about {shown} are cut at 8 tokens where the teacher reads on (student.max_length)" in caplog.text
    setup()
    assert "are cut at" not in caplog.text


def test_texts_that_the_teacher_cuts_at_the_same_place_are_not_counted(embedded_copy, caplog):
    caplog.set_level(logging.INFO, "distill")
    stage = stage_of(load_config(embedded_copy[0], ["student.max_length=8", "teacher.max_length=8"]), "ckd")
    stage.setup(torch.device("cpu"), None)
    assert "are cut at" not in caplog.text
    stage = stage_of(load_config(embedded_copy[0], ["student.max_length=8", "teacher.max_length=9"]), "ckd")
    stage.setup(torch.device("cpu"), None)
    assert "are cut at 8 tokens where the teacher reads on" in caplog.text


def test_without_the_teacher_all_texts_that_the_student_cuts_are_counted(embedded_copy, caplog, tmp_path, tiny_encoder):
    caplog.set_level(logging.INFO, "distill")
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    overrides = [f"student.init={tmp_path / 'encoder'}", "student.max_length=8", "teacher.model=owner/absent"]
    stage = stage_of(load_config(embedded_copy[0], overrides), "ckd")
    stage.setup(torch.device("cpu"), None)
    assert "sampled) are cut at 8 tokens (student.max_length)" in caplog.text


def test_held_out_shards_that_are_gone_are_missed_by_name(embedded_copy):
    config, run = embedded_copy
    (run / "shards/held_out/manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{run}/shards/held_out/manifest.json is missing: run the precompute stage again"):
        stage_of(load_config(config), "ckd").check_inputs()


@pytest.mark.slow
def test_a_stage_with_dropout_that_was_stopped_gives_the_same_student(embedded_copy):
    config, run = embedded_copy
    students = []
    for name in ("straight", "stopped"):
        overrides = [f"name={name}", f"shards_from={run.name}", *SIMCSE]
        if name == "stopped":
            stopped = on_ranks(1, train_stage, config, "simcse", overrides, lambda step: step == 1)
            assert stopped == ["simcse: stopped on request at step 1 of 4"]
            checkpoints = run.parent / name / "simcse/checkpoints"
            assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
        on_ranks(1, train_stage, config, "simcse", overrides)
        weights = run.parent / name / "simcse/student/model.safetensors"
        students.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert students[0] == students[1]


def test_a_student_that_is_damaged_since_its_stage_finished_is_restored_from_a_checkpoint_or_refused(embedded_copy, caplog):
    config, run = embedded_copy
    folder = run / "ckd/student"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_json(run / "ckd/DONE.json", {"fingerprint": student_fingerprint(folder)})
    stage = stage_of(load_config(config), "finetune")
    stage.check_inputs()
    (folder / "model.safetensors").write_bytes(b"weighus")
    with pytest.raises(ValueError, match=rf"{folder}: its files are not those .* delete {run}/ckd and run that stage again$"):
        stage.check_inputs()
    kept = run / "ckd/checkpoints/step-00000004/student"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_bytes(b"weights")
    stage.check_inputs()
    assert (folder / "model.safetensors").read_bytes() == b"weights" and f"{folder}: restored from step-00000004" in caplog.text
    assert (run / "ckd/student.damaged/model.safetensors").read_bytes() == b"weighus"


def test_a_student_that_was_deleted_is_taken_from_a_checkpoint_and_trained_again_only_without_one(embedded_copy):
    config, run = embedded_copy
    steps = ["ckd.max_steps=4", "ckd.dev_every=100", "ckd.save_every=4"]
    on_ranks(1, train_stage, config, "ckd", steps)
    before = student_fingerprint(run / "ckd/student")
    stage = stage_of(load_config(config, steps), "ckd")
    shutil.rmtree(run / "ckd/student")
    assert stage.reason_to_run() is None and student_fingerprint(run / "ckd/student") == before
    shutil.rmtree(run / "ckd/student")
    shutil.rmtree(run / "ckd/checkpoints")
    assert stage.reason_to_run() == f"{run / 'ckd/student'} is missing"


def test_other_weights_in_the_teachers_folder_are_refused_before_training(tmp_path, tiny_encoder):
    teacher = shutil.copytree(tiny_encoder, tmp_path / "teacher")
    config = embed_text(write_config(tmp_path, teacher))
    stage = stage_of(load_config(config), "ckd")
    stage.check_inputs()
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=rf"{teacher}: model\.safetensors changed since this teacher made .*shards"):
        stage.check_inputs()


def test_simcse_without_dropout_is_refused_and_with_dropout_another_number_of_ranks_is(embedded_copy, tiny_encoder, tmp_path):
    config, _ = embedded_copy
    encoder = shutil.copytree(tiny_encoder, tmp_path / "without")
    text = (encoder / "config.json").read_text()
    (encoder / "config.json").write_text(text.replace('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.0'))
    steps = ["simcse.global_batch=16", "simcse.max_steps=4", f"student.init={encoder}", "student.layers=null"]
    with pytest.raises(AssertionError, match=r"the encoder's own dropout is 0.* set simcse\.dropout=0\.1"):
        on_ranks(1, train_stage, config, "simcse", steps)
    steps.append("simcse.dropout=0.1")
    on_ranks(2, train_stage, config, "simcse", steps, lambda step: step == 2)
    with pytest.raises(AssertionError, match="ranks: 2 -> 1"):
        on_ranks(1, train_stage, config, "simcse", steps)


def test_the_content_of_a_local_encoder_is_an_input_of_the_stage_that_begins_with_it(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    stage = stage_of(load_config(config, [f"student.init={encoder}"]), "ckd")
    before = stage.inputs()["student.init"]
    (encoder / "config.json").write_text((encoder / "config.json").read_text() + " ")
    assert before and stage.inputs()["student.init"] not in ("", before)
    shutil.rmtree(encoder)
    assert stage.inputs()["student.init"] == ""
    for covered in ("student.init=teacher", "student.init=owner/model"):
        assert not stage_of(load_config(config, [covered]), "ckd").inputs().get("student.init")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Adds a commit of a model, a copy of a folder, to a hub cache, and lets its main branch be that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(name: str, folder: Path) -> str:
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(f"{folder}".encode()).hexdigest()
        shutil.copytree(folder, model / "snapshots" / commit)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs/main").write_text(commit)
        model_commit.cache_clear()
        return commit

    return add


def test_the_commit_of_a_hub_encoder_is_an_input_of_the_stage_that_begins_with_it(tmp_path, tiny_encoder, hub):
    config = load_config(embed_text(write_config(tmp_path, tiny_encoder)), ["student.init=owner/tiny"])
    stage = stage_of(config, "ckd")
    first = hub("owner/tiny", tiny_encoder)
    assert stage.inputs()["student.init"] == first
    stage.begin()
    second = hub("owner/tiny", make_encoder(tmp_path / "other", seed=1))
    assert stage.inputs()["student.init"] == first != second  # a branch that moves is no other input of a begun stage
    expected = load_file(tiny_encoder / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(stage.setup(torch.device("cpu"), None).student.encoder.get_input_embeddings().weight, expected)
    other = stage_of(load_config(config.run_dir.parent.parent / "run.yaml", ["student.init=owner/other"]), "ckd")
    third = hub("owner/other", tiny_encoder)
    assert other.inputs()["student.init"] == third


def test_a_student_begins_with_the_teacher_that_made_the_shards_also_if_its_branch_has_moved(tmp_path, tiny_encoder, hub):
    hub("owner/moving", tiny_encoder)
    config = load_config(embed_text(write_config(tmp_path, Path("owner/moving"))))
    later = hub("owner/moving", make_encoder(tmp_path / "other", seed=1))
    (tmp_path / f"hub/models--owner--moving/snapshots/{later}/model.safetensors").unlink()
    assert list(map(str, problems(config.model_copy(update={"stages": ["ckd", "export"]})))) == []
    student = stage_of(config, "ckd").setup(torch.device("cpu"), None).student
    expected = load_file(tiny_encoder / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(student.encoder.get_input_embeddings().weight, expected)


def test_the_cache_stays_until_nothing_else_is_left_to_do(tmp_path, tiny_encoder):
    stage = stage_of(load_config(write_config(tmp_path, tiny_encoder)), "hpd")
    held_out = stage.context.shards_dir / "held_out"
    held_out.mkdir(parents=True)
    (held_out / "manifest.json").touch()
    stage.cache_dir.mkdir(parents=True)
    with pytest.raises(ValueError, match="no student at"):
        stage._finish({}, torch.device("cpu"))
    assert stage.cache_dir.exists()


def test_the_row_of_the_hparams_table_names_the_teacher(tmp_path, tiny_encoder):
    stage = stage_of(load_config(write_config(tmp_path, tiny_encoder)), "ckd")
    _, (_, row) = describe_run(stage.context, "ckd", stage.settings("result"), torch.device("cpu"))
    data = HParamsPluginData.FromString(row.value[0].metadata.plugin_data.content)
    hparams = data.session_start_info.hparams
    assert hparams["teacher"].string_value == str(tiny_encoder) and hparams["stage"].string_value == "ckd"


def test_terms_of_the_loss_have_charts_of_their_own_and_sts_only_where_it_is_evaluated(tmp_path, tiny_encoder):
    def shown(name: str, *overrides: str) -> dict[str, list[str]]:
        stage = stage_of(load_config(write_config(tmp_path, tiny_encoder), list(overrides)), name)
        _, (found, _) = describe_run(stage.context, name, stage.settings("result"), torch.device("cpu"))
        groups = Layout.FromString(found.value[0].tensor.string_val[0]).category
        return {chart.title: list(chart.multiline.tag) for group in groups for chart in group.chart}

    charts = shown("ckd", "ckd.weights={ckd: 1.0, congen: 0.5}")
    assert charts["ckd and its reference"] == ["^loss/ckd$", "^reference_loss/ckd$"]
    assert charts["congen and its reference"] == ["^loss/congen$", "^reference_loss/congen$"]
    assert not any("loss/.*" in tag for tags in charts.values() for tag in tags)
    assert "contrast and its reference" in shown("finetune") and "pca and its reference" in shown("hpd")
    sts = "STS-B dev, student and teacher"
    assert sts not in charts and sts in shown("ckd", f"evaluate.sts={tmp_path}")
    parts, text = next(iter(PARTS)), tmp_path / "text.txt"
    of_roles = f"text.sources=[{{type: file, path: {text}, role: query}}, {{type: file, path: {text}, role: document}}]"
    assert parts not in charts and parts in shown("ckd", of_roles)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("ckd", ["ckd.projection=linear"]),
        ("hpd", ["hpd.init=student"]),
        ("hpd", ["hpd.init=student", "hpd.freeze_encoder=true"]),
        ("finetune", ["finetune.init=student"]),
    ],
)
def test_a_stop_is_looked_for_while_a_stage_is_built(embedded_copy, name, overrides):
    stage, is_building = stage_of(load_config(embedded_copy[0], overrides), name), False

    def check_stop() -> None:
        if is_building:
            raise Stopped("asked to")

    setup = stage.setup(torch.device("cpu"), None, check_stop)
    is_building = True
    with pytest.raises(Stopped, match="asked to"):
        stage.build(setup)
