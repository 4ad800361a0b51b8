"""The export stage writes every trained student, holds against its text, and runs again when other formats are asked for."""

from __future__ import annotations

import pytest
from conftest import sentences, write_config
from students import make_student

from distill.config import ConfigError, load_config
from distill.export import formats, stage
from distill.files import write_json
from distill.stages import fingerprint_of, read_json, stage_of


class Reader:
    """A set of shards: 1,200 sentences."""

    def __init__(self, directory):
        self.known = sentences(1200)

    def __len__(self):
        return len(self.known)

    def texts(self, rows):
        return [self.known[row] for row in rows]


@pytest.fixture
def run(tmp_path, tiny_encoder, monkeypatch):
    """A run with a finished ckd, and what load_config gives for it."""
    monkeypatch.setattr(stage, "ShardReader", Reader)

    def load(*overrides):
        return load_config(write_config(tmp_path, tiny_encoder), ["stages=[ckd, export]", *overrides])

    make_student(load().run_dir / "ckd/student", tiny_encoder)
    write_json(load().run_dir / "ckd/DONE.json", {"config": {}, "inputs": {}, "fingerprint": "made"})
    return load


def test_students_are_checked_on_1000_sentences_and_the_stage_is_then_done(run):
    folders = stage.export_run(run())
    export = run().run_dir / "export"
    assert folders == {"ckd": str(export / "ckd")} and (export / "ckd/modules.json").is_file()
    assert read_json(export / "ckd/export.json")["checked_on"] == 1000
    cosines = read_json(export / "DONE.json")["results"]["cosines"]["ckd"]
    assert list(cosines) == ["sentence-transformers"] and cosines["sentence-transformers"]["worst"] > 0.9999
    assert stage_of(run(), "export").reason_to_run() is None
    assert "export" not in stage_of(run(), "export").config  # so that an export of before there were formats still counts


def test_other_formats_run_the_stage_again_and_change_what_it_made(run):
    pytest.importorskip("onnxscript")
    stage.export_run(run())
    before = fingerprint_of(run().run_dir / "export")
    config = run("export.formats=[onnx-int8]")
    assert stage_of(config, "export").reason_to_run() == 'export: null -> {"formats": ["onnx-int8"]}'
    stage.export_run(config)
    assert fingerprint_of(config.run_dir / "export") != before and stage_of(config, "export").reason_to_run() is None
    assert (config.run_dir / "export/ckd/onnx/model_int8.onnx").is_file()


def test_what_cannot_be_exported_is_said_before_the_stage_begins(run, monkeypatch):
    with pytest.raises(ValueError, match=r"student\.pooling concat_last4_mean cannot be exported"):
        stage.export_run(run("student.pooling=concat_last4_mean"))
    with pytest.raises(ValueError, match=r"hpd, which is not finished: run that stage first"):
        stage.export_run(run("stages=[ckd, hpd, export]"))
    monkeypatch.setattr(formats, "PACKAGES", ("onnx_that_nobody_has",))
    with pytest.raises(ValueError, match=r"onnx_that_nobody_has: bash launcher/install.sh quickstart,onnx"):
        stage.export_run(run("export.formats=[onnx]"))
    assert not (run().run_dir / "export").exists()


def test_a_format_that_is_unknown_is_a_config_error(run):
    with pytest.raises(ConfigError, match=r"export\.formats\.0.*'onnx' or 'onnx-int8'"):
        run("export.formats=[openvino]")
