"""A study end to end on a tiny encoder: which rows there are, what they are compared to, and what is not done twice."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from commands import launch
from conftest import sentences, write_pairs

from distill.metrics.results import read_results
from distill.run.config import ConfigError
from distill.run.formatting import format_markdown_table
from distill.study.study_charts import write_charts
from distill.study.study_configs import read_study
from distill.study.study_rows import read_rows, study_table

BASE = """
runs_dir: {runs}
shards_from: shared
text: {{sources: [{{type: file, path: {text}}}]}}
teacher: {{model: {encoder}, pooling: mean, max_length: 32, precision: fp32}}
shards: {{rows: 200, block_rows: 64}}
student: {{layers: [0, 2], max_length: 32}}
ckd: {{global_batch: 32, micro_batch: 16, queue: 128, max_steps: 8, dev_every: 4, lr: 1.0e-3, weights: {{cosine: 1.0}}}}
hpd: {{dim: 16, nested: [8], global_batch: 32, micro_batch: 16, max_steps: 3, init: ckd}}
evaluate: {{sts: {sts}, precision: [int8, binary], baselines: true}}
engine: {{num_ranks: 1, precision: fp32}}
stages: [precompute, ckd, export, evaluate]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_encoder):
    """A study of three students, of which two begin alike, and what it reads."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text.txt").write_text("\n".join(sentences(600)) + "\n")
    sts = write_pairs(folder / "sts", count=80)
    places = {"runs": folder / "runs", "text": folder / "text.txt", "encoder": tiny_encoder, "sts": sts}
    (folder / "configs").mkdir()
    (folder / "configs/base.yaml").write_text(BASE.format(**places))
    write(folder, "cosine", "stages: [precompute, ckd, hpd, export, evaluate]")
    write(folder, "mse", "ckd: {weights: {mse: 1.0}}", "student: {freeze_embeddings: true}")
    write(folder, "one-layer", "student: {layers: [1]}")
    return folder


def write(folder, name, *lines):
    (folder / f"configs/{name}.yaml").write_text("\n".join([f"name: {name}", "base: base.yaml", *lines]))


@pytest.fixture(scope="module")
def rows(folder):
    """The rows by name, after the study has run."""
    done = launch("study.py", folder / "configs")
    assert done.returncode == 0, done.stdout
    return {row.name: row for row in read_rows(read_study(folder / "configs"))}


@pytest.mark.soak
def test_every_size_of_every_stage_has_a_row_beside_the_alternatives_to_training(rows, folder):
    initial = {name: row.initial for name, row in rows.items()}
    assert initial == {
        "teacher": None,
        "teacher-pca-16": "teacher",
        "teacher-pca-8": "teacher",
        "untrained-tiny-0-2": None,
        "cosine": "untrained-tiny-0-2",
        "cosine-pca-16": "cosine",
        "cosine-pca-8": "cosine",
        "cosine-hpd": "cosine",
        "cosine-hpd-8": "cosine",
        "mse": "untrained-tiny-0-2",
        "untrained-tiny-1": None,
        "one-layer": "untrained-tiny-1",
    }
    sizes = {name: row.results.dim for name, row in rows.items()}
    assert sizes["teacher"] == 32 and sizes["cosine-hpd"] == 16 and sizes["cosine-hpd-8"] == sizes["cosine-pca-8"] == 8
    assert read_results(folder / "runs/results.json") == {name: row.results for name, row in sorted(rows.items())}


@pytest.mark.soak
def test_results_are_those_of_the_models(rows):
    fidelity = {name: row.results.fidelity.spearman for name, row in rows.items()}
    assert fidelity["teacher"] == pytest.approx(1, abs=1e-4)
    assert fidelity["cosine"] > fidelity["untrained-tiny-0-2"]
    assert fidelity["teacher-pca-16"] > fidelity["teacher-pca-8"]
    assert rows["one-layer"].results.params < rows["cosine"].results.params < rows["teacher"].results.params
    assert rows["cosine"].results.texts_per_second > 0
    assert rows["cosine"].minutes > 0 and rows["teacher"].minutes is None


@pytest.mark.soak
def test_differences_are_those_to_the_teacher_and_the_initial_model(rows):
    table = study_table(list(rows.values()))
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    for name, row in rows.items():
        average = row.results.sts["AVG"]
        for column, other in (("to the teacher (95%)", "teacher"), ("to its initial model (95%)", row.initial)):
            if other is None or (name == "teacher"):
                assert cells[name][column] is None
                continue
            value, interval = cells[name][column].split(" ", 1)
            low, high = interval.strip("()").split(" .. ")
            assert float(value) == pytest.approx(average - rows[other].results.sts["AVG"], abs=0.006)
            assert float(low) - 0.01 <= float(value) <= float(high) + 0.01
        assert abs(float(cells[name]["int8"]) - average) < 5


@pytest.mark.soak
def test_the_same_command_again_trains_and_measures_nothing(folder, rows):
    watched = [*(folder / "runs").rglob("measured/*.json"), *(folder / "runs").rglob("*.safetensors")]
    assert len({path.name.split("-")[0] for path in watched}) > 3  # one file for the teacher, though three runs have it
    assert len([path for path in watched if path.name.startswith("teacher-")]) == 2  # with the sizes of `cosine`, and without
    before = {path: path.stat().st_mtime_ns for path in watched}
    done = launch("study.py", folder / "configs")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in watched} == before and len(before) > 8


@pytest.mark.soak
def test_the_table_and_the_charts_are_complete(folder, rows):
    lines = (folder / "runs/table.md").read_text().splitlines()
    assert len(lines) == len(rows) + 2 and len({line.count("|") for line in lines}) == 1
    table = study_table(list(rows.values()))
    assert format_markdown_table(table.header, table.rows).splitlines() == lines
    written = [(folder / "runs" / name).read_bytes() for name in ("bytes.svg", "speed.svg")]
    assert written == [path.read_bytes() for path in write_charts(list(rows.values()), folder / "sts")]
    shown = ["".join(ElementTree.fromstring(svg).itertext()) for svg in written]
    assert "teacher, PCA, int8" in shown[0] and "cosine-hpd, binary" in shown[0] and "one-layer" in shown[1]
    assert "cosine-hpd-8" not in shown[1]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["shards_from: null"], "the same shards_from"),
        (["text: {max_sentences: 100}"], r"needs other shards than .*cosine.yaml: text.max_sentences: null -> 100"),
        (["evaluate: {sts: null}"], "evaluated otherwise"),
        (["stages: [precompute, ckd, export]"], "stages lacks evaluate"),
        (["name: another"], "is named like its file"),
    ],
)
def test_students_that_cannot_be_compared_are_refused(folder, lines, message):
    write(folder, "odd", *lines)
    try:
        with pytest.raises(ConfigError, match=message):
            read_study(folder / "configs")
    finally:
        (folder / "configs/odd.yaml").unlink()


def test_a_study_without_held_out_texts_or_sts_is_refused(folder):
    for override, message in (("text.held_out=0", "text.held_out is 0"), ("evaluate.sts=null", "evaluate.sts is missing")):
        with pytest.raises(ConfigError, match=message):
            read_study(folder / "configs", None, [override])


def test_a_file_over_all_students_changes_all(folder, tmp_path):
    (tmp_path / "over.yaml").write_text("seed: 7\nckd: {lr: 0.5}\n")
    configs = read_study(folder / "configs", tmp_path / "over.yaml", ["ckd.max_steps=2"])
    assert {(config.seed, config.ckd.lr, config.ckd.max_steps) for config in configs} == {(7, 0.5, 2)}
