"""How a stage begins and ends: its inputs, its modules' mode, dropout that a stop does not change, its cache."""

from __future__ import annotations

import hashlib
import logging
import shutil

import pytest
import torch
from conftest import write_config
from distributed_ranks import on_ranks
from engines import embed_text, train_stage
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from distill.config import load_config, stage_of
from distill.run.files import write_json
from distill.student.fingerprint import student_fingerprint
from distill.training.dashboard import describe_run
from distill.training.loop import Trainer

SIMCSE = ("simcse.global_batch=16", "simcse.micro_batch=16", "simcse.max_steps=4", "simcse.dropout=0.3",
          "simcse.lr=1e-3", "simcse.dev_every=100", "engine.precision=fp32")  # fmt: skip


@pytest.mark.parametrize("name", ["ckd", "simcse"])
def test_every_module_is_in_training_mode_from_the_first_step(embedded_copy, name):
    stage = stage_of(load_config(embedded_copy[0]), name)
    task = stage.build(stage.setup(torch.device("cpu"), None))
    assert all(module.training for module in task.module.modules())


def train_without_memory(config, *overrides) -> str:
    def run(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    Trainer.run = run
    with pytest.raises(ValueError) as error:
        train_stage(config, "ckd", overrides)
    return str(error.value)


def test_out_of_memory_names_a_smaller_micro_batch(embedded_copy):
    (message,) = on_ranks(1, train_without_memory, embedded_copy[0])
    assert message.startswith("ckd: out of device memory with ckd.micro_batch 8: set ckd.micro_batch=4, engine.")
    (message,) = on_ranks(1, train_without_memory, embedded_copy[0], "ckd.micro_batch=1")
    assert message.startswith("ckd: out of device memory with ckd.micro_batch 1: engine.activation_checkpointing=true")


@pytest.mark.parametrize("name", ["ckd", "simcse"])
def test_texts_that_fill_no_global_batch_are_counted_in_the_log(embedded_copy, caplog, name):
    stage = stage_of(load_config(embedded_copy[0], [f"{name}.global_batch=100"]), name)
    caplog.set_level(logging.INFO, "distill")
    setup = stage.setup(torch.device("cpu"), None)
    stage.build(setup)
    texts = len(setup.reader)
    assert f"{texts % 100} of {texts} texts are left out of each epoch: they do not fill a global batch of 100" in caplog.text


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
