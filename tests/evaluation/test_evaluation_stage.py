"""The evaluate stage on a run whose precompute is done: what is measured, at which sizes, and what is not measured twice."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from conftest import sentences, write_config, write_pairs
from retrieval_sets import write_folder

from distill.config import load_config, stage_of
from distill.corpus import evaluation_sets
from distill.corpus.evaluation_sets import read_retrieval
from distill.evaluation import evaluate_stage, measure
from distill.evaluation.measure import Measurement, Model
from distill.evaluation.model_encoder import encoder_of
from distill.evaluation.retrieval import retrieval_scores
from distill.evaluation.tasks import read_tasks
from distill.metrics.results import read_results, write_results
from distill.run.files import read_json, write_json
from distill.run.precision import has_bf16
from distill.run.session_log import device_name
from distill.shards import ShardReader
from distill.teacher.encoder import Teacher, evaluation_dtype

CPU = torch.device("cpu")


class Letters:
    """Counts of letters, as an encoder of seven dimensions."""

    dim, params, dtype = 7, 70, "float32"

    def __call__(self, texts: list[str], side: str | None = None) -> np.ndarray:
        return np.array([[text.count(letter) + 0.1 for letter in "abcdefg"] for text in texts], dtype=np.float32)


@pytest.fixture
def measurement(monkeypatch, tmp_path, embedded_once):
    monkeypatch.setattr(measure, "throughput", lambda encoder, texts: 100.0)
    found = write_folder(tmp_path / "found", "1\t2\t2\n1\t1\t1\n2\t1\t1\n")
    sts = write_pairs(tmp_path / "sts")
    return lambda: Measurement(read_tasks(str(sts), [str(found)]), embedded_once / "runs/tiny/shards", 50, 1000)


def test_nested_and_pca_sizes_are_measured_on_projections_of_the_same_vectors(measurement):
    rows = measurement().measure(Model("hpd", "id", Letters, nested=(3,), pca=(2, 1)))
    assert list(rows) == ["hpd", "hpd-3", "hpd-pca-2", "hpd-pca-1"]
    assert [row.bytes_per_vector for row in rows.values()] == [28, 12, 8, 4]
    assert rows["hpd"].retrieval.keys() == {"found"} and rows["hpd"].retrieval != rows["hpd-3"].retrieval
    assert len({row.resamples["found ndcg@10"].sample for row in rows.values()}) == 1
    alone = measurement().measure(Model("hpd", "id", Letters))
    assert alone == {"hpd": rows["hpd"]}


def test_the_key_of_a_measurement_changes_with_the_model_its_sizes_and_the_sets(measurement, tmp_path):
    before = measurement()
    keys = {
        before.key(model, "cpu")
        for model in (
            *(Model("a", "1", Letters), Model("a", "2", Letters), Model("a", "1", Letters, (3,))),
            Model("a", "1", Letters, dtype="torch.bfloat16"),
        )
    }
    assert len(keys) == 4 and measurement().key(Model("a", "1", Letters), "cpu") in keys
    write_pairs(tmp_path / "sts", count=50)
    assert measurement().key(Model("a", "1", Letters), "cpu") not in keys


@pytest.fixture
def stage(tmp_path, tiny_encoder):
    """The evaluate stage of a run in which nothing was measured yet."""
    found = stage_of(load_config(write_config(tmp_path, tiny_encoder)), "evaluate")
    found.context.run_dir.mkdir(parents=True)
    return found


def test_the_content_of_the_files_that_are_read_is_an_input(tmp_path, tiny_encoder):
    sts, found, kind = write_pairs(tmp_path / "sts"), write_folder(tmp_path / "found", "1\t2\t2\n"), tmp_path / "kind"
    kind.mkdir()
    (kind / "train.tsv").write_text("label\ttext\n" + "a\tb\n" * 20)
    overrides = [f"evaluate.sts={sts}", f"evaluate.retrieval=[{found}]", f"evaluate.transfer=[{kind}]"]
    inputs = stage_of(load_config(write_config(tmp_path, tiny_encoder), overrides), "evaluate").inputs
    seen = [inputs()]
    assert seen[0].keys() == {"export", "shards", f"sts {sts}", f"retrieval {found}", f"transfer {kind}"}

    def changed() -> list[str]:
        seen.append(inputs())
        return [name for name in seen[-1] if seen[-1][name] != seen[-2][name]]

    assert changed() == []
    qrels = found / "qrels.tsv"
    before = qrels.stat()
    qrels.write_text(qrels.read_text().replace("1\t2\t2", "1\t3\t2"))  # of the same size
    os.utime(qrels, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed() == [f"retrieval {found}"]
    write_pairs(sts, "sts13_test")
    assert changed() == [f"sts {sts}"]
    (kind / "dev.tsv").write_text("label\ttext\na\tb\n")
    assert changed() == [f"transfer {kind}"]
    (kind / "notes.txt").write_text("not read")
    assert changed() == []
    (kind / "train.tsv").unlink()
    (kind / "dev.tsv").unlink()
    assert changed() == [f"transfer {kind}"] and seen[-1][f"transfer {kind}"] == ""


def test_a_set_of_the_hub_is_an_input_by_its_commit_and_unchanged_without_a_connection(tmp_path, tiny_encoder, monkeypatch):
    commits = {"made/up": "1"} | dict.fromkeys(evaluation_sets.HUB.values(), "2")
    monkeypatch.setattr(evaluation_sets, "dataset_commit", lambda name: commits.get(name, ""))
    overrides = ["evaluate.sts=hub", "evaluate.retrieval=[hub:made/up]", "evaluate.transfer=[hub:made/up]"]
    stage = stage_of(load_config(write_config(tmp_path, tiny_encoder), overrides), "evaluate")
    first = stage.inputs()
    commits["made/up-qrels"] = "3"
    second = stage.inputs()
    assert [name for name in first if first[name] != second[name]] == ["retrieval hub:made/up"]
    stage.directory.mkdir(parents=True)
    write_json(stage.directory / "DONE.json", {"inputs": second})
    commits.clear()
    assert stage.inputs() == second


MODEL = Model("hpd", "id", Letters, nested=(3,), pca=(2, 4, 1))


def test_a_kept_measurement_keeps_the_order_of_its_sizes_and_is_of_the_named_device(measurement, stage, monkeypatch):
    measured = stage._measured(MODEL, measurement(), CPU)
    (path,) = (stage.context.run_dir / "measured").iterdir()
    assert path.stem == measurement().key(MODEL, device_name(CPU))
    monkeypatch.delattr(Measurement, "measure")
    assert list(stage._measured(MODEL, measurement(), CPU).items()) == list(measured.items())


def cut(path, results):
    path.write_bytes(path.read_bytes()[:-20])


def no_json(path, results):
    path.write_text("dim: 16")


def other_version(path, results):
    write_json(path, read_json(path) | {"version": 0})


def other_sizes(path, results):
    write_results(path, {"hpd": results["hpd"], "hpd-5": results["hpd-3"]})


@pytest.mark.parametrize("damage", [cut, no_json, other_version, other_sizes])
def test_a_kept_measurement_that_cannot_be_used_is_measured_again_with_one_warning(measurement, stage, caplog, damage):
    measured = stage._measured(MODEL, measurement(), CPU)
    (path,) = (stage.context.run_dir / "measured").iterdir()
    damage(path, measured)
    assert stage._measured(MODEL, measurement(), CPU) == measured == read_results(path)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert str(path) in warning


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of a finished run and its config with `overrides`."""
    config, directory, _ = finished
    runs = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(directory, runs / directory.name)
    return lambda *overrides: load_config(config, [f"runs_dir={runs}", *overrides])


def test_baselines_are_the_student_before_training_and_pca_at_the_sizes_of_the_compressed_students(run):
    config = run("evaluate.baselines=true", "evaluate.precision=[int8, binary]")
    assert stage_of(config, "evaluate").run(CPU)
    results = read_results(config.run_dir / "evaluate/results.json")
    pca = {f"{name}-pca-{size}" for name in ("teacher", config.hpd.init) for size in (16, 8)}
    assert set(results) == {"teacher", "untrained", "ckd", "finetune", "hpd", "hpd-8"} | pca
    assert results["teacher-pca-16"].dim == 16 and results["teacher-pca-16"].params == results["teacher"].params
    assert results["teacher-pca-16"].fidelity.spearman > results["teacher-pca-8"].fidelity.spearman
    assert results["untrained"].params == results["ckd"].params and results["untrained"].fidelity != results["ckd"].fidelity
    assert set(results["hpd"].sts_quantised) == {"int8", "binary"}
    components, _ = ShardReader(config.shards_dir).moments.pca(8)
    assert components.shape == (8, results["teacher"].dim)


def test_a_model_that_was_measured_on_the_same_sets_is_not_measured_again(run, monkeypatch, caplog):
    config = run("evaluate.baselines=true", "evaluate.precision=[int8, binary]")
    stage_of(config, "evaluate").run(CPU)
    before = read_results(config.run_dir / "evaluate/results.json")
    monkeypatch.setattr(Measurement, "measure", lambda self, model, *_: pytest.fail(f"{model.name} is measured again"))
    stage_of(config, "evaluate").run(CPU)
    assert read_results(config.run_dir / "evaluate/results.json") == before
    other = run("evaluate.baselines=true", "evaluate.precision=[int8, binary]", "evaluate.num_held_out=7")
    with pytest.raises(pytest.fail.Exception, match="teacher is measured again"):
        stage_of(other, "evaluate").run(CPU)
    shutil.rmtree(other.run_dir / "evaluate")


def test_asymmetric_search_is_of_the_students_queries_among_the_teachers_documents(run, tmp_path, monkeypatch):
    documents = [(str(number), "", text) for number, text in enumerate(sentences(120))]
    found = []
    for name, some in (("first", documents[:60]), ("second", documents[60:])):
        queries = [(f"q{number}", " ".join(some[number][2].split()[:3])) for number in range(20)]
        qrels = "".join(f"q{number}\t{some[number][0]}\t1\n" for number in range(20))
        found.append(write_folder(tmp_path / name, qrels, documents=some, queries=queries))
    shutil.copytree(run().run_dir, tmp_path / run().name)
    config = run("export.asymmetric=true", f"runs_dir={tmp_path}", f"evaluate.retrieval=[{found[0]},{found[1]}]")
    assert stage_of(config, "export").run(CPU) and stage_of(config, "evaluate").run(CPU)
    results = read_results(config.run_dir / "evaluate/results.json")
    assert [name for name in results if "asymmetric" in name] == ["ckd-asymmetric", "finetune-asymmetric"]
    own = results["ckd-asymmetric"]
    assert (own.dim, own.params) == (results["teacher"].dim, results["ckd"].params) and not own.sts
    student = encoder_of(config.run_dir / "export/ckd-asymmetric", device="cpu")
    teacher = Teacher(config.teacher, CPU, None)
    given = {folder.name: read_retrieval(folder) for folder in found}
    expected = retrieval_scores(lambda texts, role: (student if role == "query" else teacher)(texts, role), given)
    for name in given:
        assert own.retrieval[name] == pytest.approx(expected["retrieval"][name])
    assert own.retrieval not in (results["ckd"].retrieval, results["teacher"].retrieval)
    # what was kept of the teacher serves the same sets in another order, as long as it is whole
    reordered = run("export.asymmetric=true", f"runs_dir={tmp_path}", f"evaluate.retrieval=[{found[1]},{found[0]}]")
    for path in (config.run_dir / "measured").glob("*-asymmetric-*.json"):
        path.unlink()
    monkeypatch.setattr(Measurement, "measure", lambda self, model, *_: pytest.fail(f"{model.name} is measured again"))
    assert stage_of(reordered, "evaluate").run(CPU)
    again = read_results(config.run_dir / "evaluate/results.json")["ckd-asymmetric"]
    assert again.retrieval == own.retrieval
    [kept] = (config.run_dir / "measured").glob("*-documents.npy")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x01")
    with pytest.raises(pytest.fail.Exception, match="teacher is measured again"):
        stage_of(config, "evaluate").run(CPU)


def test_a_finished_stage_runs_again_and_measures_again_when_the_content_of_a_set_has_changed(run, tmp_path, monkeypatch):
    sts = shutil.copytree(run().evaluate.sts, tmp_path / "sts")
    stage = stage_of(run(f"evaluate.sts={sts}"), "evaluate")
    stage.run(CPU)
    assert stage.reason_to_run() is None
    write_pairs(sts, "stsb_test", count=50)
    assert stage.reason_to_run().startswith(f"input sts {sts}: ")
    monkeypatch.setattr(Measurement, "measure", lambda self, model, *_: pytest.fail(f"{model.name} is measured again"))
    with pytest.raises(pytest.fail.Exception, match="teacher is measured again"):
        stage.run(CPU)
    shutil.rmtree(stage.directory)


def test_the_teacher_is_measured_in_its_configured_precision_and_every_row_names_its_type(run, monkeypatch):
    monkeypatch.setattr("distill.run.precision.has_bf16", lambda device: True)
    stage = stage_of(run("teacher.precision=bf16"), "evaluate")
    stage.run(CPU)
    results = read_results(stage.directory / "results.json")
    assert {name: row.dtype for name, row in results.items()} == {
        "teacher": "bfloat16", **dict.fromkeys(["ckd", "finetune", "hpd", "hpd-8"], "float32")
    }  # fmt: skip
    assert "bfloat16" in (stage.directory / "table.txt").read_text()
    shutil.rmtree(stage.directory)


def test_one_model_is_in_memory_at_a_time(run, monkeypatch):
    alive: weakref.WeakSet = weakref.WeakSet()
    before = []

    def counted(load):
        def loaded(*arguments, **options):
            gc.collect()
            before.append(len(alive))
            alive.add(model := load(*arguments, **options))
            return model

        return loaded

    for name in ("encoder_of", "_load_teacher", "StudentEncoder"):
        monkeypatch.setattr(evaluate_stage, name, counted(getattr(evaluate_stage, name)))
    stage = stage_of(run("evaluate.baselines=true", "evaluate.num_held_out=9"), "evaluate")
    stage.run(CPU)
    assert before == [0] * 6  # the teacher, the untrained student, three students, and the search index's
    shutil.rmtree(stage.directory)


def test_out_of_memory_names_a_smaller_batch(run, monkeypatch):
    def measure(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Measurement, "measure", measure)
    stage = stage_of(run("evaluate.num_held_out=11"), "evaluate")
    with pytest.raises(ValueError, match=r"^teacher: out of device memory: set evaluate\.batch_size=32$"):
        stage.run(CPU)
    shutil.rmtree(stage.directory)


def test_the_teacher_is_faithful_to_the_shards_that_it_made_in_16_bits(tmp_path, tiny_encoder):
    precision = "bf16" if has_bf16(CPU) else "fp32"
    config = load_config(write_config(tmp_path, tiny_encoder), [f"teacher.precision={precision}"])
    assert stage_of(config, "precompute").run(CPU)
    load = partial(
        evaluate_stage._load_teacher, config.teacher, CPU, evaluation_dtype(config.teacher, CPU), tmp_path / "offload"
    )
    found = Measurement(read_tasks(None, []), config.shards_dir, 50, 1000).measure(Model("teacher", "id", load))["teacher"]
    assert found.fidelity.spearman > 0.999 and found.fidelity.top10 == 1
    assert ("bfloat16" in found.dtype) == (precision == "bf16")


def test_exported_weights_that_changed_after_the_export_stage_finished_are_not_measured(run):
    config = run("evaluate.sts=/no/such/folder")  # the check comes before the sets are read
    weights = config.run_dir / "export/ckd/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"export: its files are not those .*; delete \S+/export and run that stage again"):
        stage_of(config, "evaluate").run(CPU)
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="no STS sets in /no/such/folder"):
        stage_of(config, "evaluate").run(CPU)


def test_the_stage_writes_its_own_directory_and_what_later_readers_need(run):
    config = run("stages=[precompute, ckd, export, evaluate]")
    card = config.run_dir / "export/ckd/README.md"
    before = card.stat().st_mtime_ns
    stage_of(config, "evaluate").run(CPU)
    evaluated = config.run_dir / "evaluate"
    assert {"results.json", "table.txt", "neighbours.json", "index.npy", "DONE.json"} <= {
        path.name for path in evaluated.iterdir()
    }
    models = ["teacher", "ckd", "finetune", "hpd", "hpd-8"]  # those of stages that run now or are finished
    files = ["results.json", "index.npy", "neighbours.json"]
    assert read_json(evaluated / "DONE.json")["results"] == {"models": models, "index": "hpd", "files": files}
    assert card.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["results.json", "index.npy", "neighbours.json"])
def test_a_damaged_file_of_the_finished_stage_is_named_and_made_again(run, name, caplog):
    config = run("stages=[precompute, ckd, export, evaluate]")
    path = config.run_dir / "evaluate" / name
    before = path.read_bytes()
    path.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
    stage = stage_of(config, "evaluate")
    assert stage.reason_to_run() == f"{path} is missing" and f"{path} is damaged" in caplog.text
    stage.run(CPU)
    assert stage.reason_to_run() is None and path.read_bytes() == before
