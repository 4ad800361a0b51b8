"""The export stage writes every trained student, verifies it on its text, and runs again when other formats are requested."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_encoder, write_config
from distributed_ranks import on_ranks
from engines import train_stage
from sentence_transformers import SentenceTransformer
from students import make_student

from distill.config import load_config, stage_of
from distill.export import formats
from distill.run.config import ConfigError
from distill.run.files import read_json, write_json
from distill.run.stage import stage_fingerprint
from distill.shards import ShardReader
from distill.student import Student
from distill.student.fingerprint import student_fingerprint
from distill.student.student import load_projection

CPU = torch.device("cpu")
STEPS = ["ckd.max_steps=3", "hpd.max_steps=3", "hpd.init=ckd"]


@pytest.fixture
def run(embedded_copy, tmp_path, tiny_encoder):
    """run(*overrides): the config, with these overrides, of a run whose ckd stage is finished."""

    def load(*overrides):
        return load_config(write_config(tmp_path, tiny_encoder), ["stages=[ckd, export]", *overrides])

    make_student(load().run_dir / "ckd/student", tiny_encoder)
    made = student_fingerprint(load().run_dir / "ckd/student")
    write_json(load().run_dir / "ckd/DONE.json", {"settings": {}, "inputs": {}, "fingerprint": made})
    return load


def export(config):
    return stage_of(config, "export").run(CPU)


def test_students_are_verified_on_the_shards_text_and_the_stage_is_then_done(run):
    assert export(run())
    place = run().run_dir / "export"
    done = read_json(place / "DONE.json")["results"]
    assert done["folders"] == {"ckd": str(place / "ckd")} and (place / "ckd/modules.json").is_file()
    assert read_json(place / "ckd/export.json")["checked_on"] == len(ShardReader(run().shards_dir)) > 300
    cosines = done["cosines"]["ckd"]
    assert list(cosines) == ["sentence-transformers"] and cosines["sentence-transformers"]["worst"] > 0.9999
    assert stage_of(run(), "export").reason_to_run() is None
    assert "## Results" not in (place / "ckd/README.md").read_text()


@pytest.mark.slow
def test_other_formats_run_the_stage_again_and_change_what_it_made(run):
    pytest.importorskip("onnxscript")
    export(run())
    before = stage_fingerprint(run().run_dir / "export")
    config = run("export.formats=[onnx-int8]")
    assert stage_of(config, "export").reason_to_run() == 'export.formats: [] -> ["onnx-int8"]'
    export(config)
    assert stage_fingerprint(config.run_dir / "export") != before and stage_of(config, "export").reason_to_run() is None
    assert (config.run_dir / "export/ckd/onnx/model_quantized.onnx").is_file()
    export(run())
    assert (config.run_dir / "export/ckd/onnx/model_quantized.onnx").is_file() and not stage_of(run(), "export").reason_to_run()


def test_an_asymmetric_export_encodes_queries_in_the_teachers_space(embedded_copy, tmp_path, tiny_encoder):
    narrow = make_encoder(tmp_path / "narrow", layers=2, width=16, seed=3)
    student = f"{{init: {narrow}, max_length: 32, prompts: {{query: 'the query asks for '}}}}"
    path = write_config(tmp_path, tiny_encoder, student=student, stages="[ckd, hpd, export]")
    plain = load_config(path, STEPS)
    for stage in ("ckd", "hpd"):
        on_ranks(1, train_stage, path, stage, STEPS)
    config = load_config(path, [*STEPS, "export.asymmetric=true"])
    assert export(config)
    place = config.run_dir / "export"
    assert read_json(place / "DONE.json")["results"]["asymmetric"] == ["ckd"]
    assert sorted(folder.name for folder in place.iterdir() if folder.is_dir()) == ["ckd", "ckd-asymmetric", "hpd"]
    exported = SentenceTransformer(str(place / "ckd-asymmetric"), device="cpu")
    texts = ShardReader(config.shards_dir).texts(range(20))
    trained = Student.load(config.run_dir / "ckd/student").eval()
    projection = load_projection(config.run_dir / "ckd/student")
    with torch.no_grad():
        vectors = projection(torch.from_numpy(trained.encode(texts, normalize=False, roles=["query"] * 20)))
    expected = torch.nn.functional.normalize(vectors, dim=-1).numpy()
    assert np.allclose(exported.encode_query(texts), expected, atol=1e-5)
    assert exported.get_embedding_dimension() == 32 and trained.dim == 16
    assert "For queries alone" in (place / "ckd-asymmetric/README.md").read_text()
    assert "For queries alone" not in (place / "ckd/README.md").read_text()
    # it stays with these students, and goes with them
    assert stage_of(config, "export").reason_to_run() is None
    export(plain)
    assert (place / "ckd-asymmetric").is_dir() and read_json(place / "DONE.json")["results"]["asymmetric"] == ["ckd"]
    done = read_json(plain.run_dir / "ckd/DONE.json")
    write_json(plain.run_dir / "ckd/DONE.json", done | {"fingerprint": "another"})
    make_student(plain.run_dir / "ckd/student", tiny_encoder)
    write_json(plain.run_dir / "ckd/DONE.json", done | {"fingerprint": student_fingerprint(plain.run_dir / "ckd/student")})
    export(plain)
    assert not (place / "ckd-asymmetric").exists() and read_json(place / "DONE.json")["results"]["asymmetric"] == []


def test_what_cannot_be_exported_is_refused_before_the_stage_begins(run, tiny_encoder, monkeypatch):
    with pytest.raises(ValueError, match=r"hpd, which is not finished: run that stage first"):
        export(run("stages=[ckd, hpd, export]"))
    with monkeypatch.context() as patch:
        patch.setattr(formats, "PACKAGES", ("onnx_that_nobody_has",))
        with pytest.raises(ValueError, match=r"onnx_that_nobody_has: bash launcher/install.sh quickstart,onnx"):
            export(run("export.formats=[onnx]"))
    student = run().run_dir / "ckd/student"
    make_student(student, tiny_encoder, pooling="concat_last4_mean")
    write_json(student.parent / "DONE.json", {"fingerprint": student_fingerprint(student)})
    with pytest.raises(ValueError, match=r"student\.pooling concat_last4_mean cannot be exported"):
        export(run())
    assert not (run().run_dir / "export").exists()


def test_a_student_whose_weights_changed_after_its_stage_finished_is_not_exported(run):
    weights = run().run_dir / "ckd/student/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"ckd/student: its files are not those .*; delete \S+/ckd and run that stage again"):
        export(run())
    assert not (run().run_dir / "export").exists()


def test_an_unknown_format_is_a_config_error(run):
    with pytest.raises(ConfigError, match=r"export\.formats\.0.*'onnx' or 'onnx-int8'"):
        run("export.formats=[openvino]")
