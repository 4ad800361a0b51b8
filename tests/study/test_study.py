"""A study end to end on a tiny encoder: which rows there are, what they are held against, what is not done twice."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from commands import launch
from conftest import sentences, write_pairs

from distill.config import ConfigError
from distill.evaluation.quantise import stored
from distill.study import configs_of, draw, markdown

BASE = """
runs_dir: {runs}
shards_from: shared
text: {{sources: [{{type: file, path: {text}}}]}}
teacher: {{model: {encoder}, pooling: mean, max_length: 32, precision: fp32}}
shards: {{rows: 200, block_rows: 64}}
student: {{layers: [0, 2], max_length: 32}}
ckd: {{global_batch: 32, micro_batch: 16, queue: 128, max_steps: 8, dev_every: 4, lr: 1.0e-3, weights: {{cosine: 1.0}}}}
hpd: {{dim: 16, nested: [8], global_batch: 32, micro_batch: 16, max_steps: 3, init: ckd}}
evaluate: {{sts: {sts}}}
engine: {{num_ranks: 1, precision: fp32}}
stages: [precompute, ckd, export]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_encoder):
    """A study of three students, of which two begin alike, and what it reads."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text.txt").write_text("\n".join(sentences(600)) + "\n")
    sts = write_pairs(folder / "sts", count=80)
    of = {"runs": folder / "runs", "text": folder / "text.txt", "encoder": tiny_encoder, "sts": sts}
    (folder / "configs").mkdir()
    (folder / "configs/base.yaml").write_text(BASE.format(**of))
    write(folder, "cosine", "stages: [precompute, ckd, hpd, export]")
    write(folder, "mse", "ckd: {weights: {mse: 1.0}}", "student: {freeze_embeddings: true}")
    write(folder, "one-layer", "student: {layers: [1]}")
    return folder


def write(folder, name, *lines):
    (folder / f"configs/{name}.yaml").write_text("\n".join([f"name: {name}", "base: base.yaml", *lines]))


@pytest.fixture(scope="module")
def results(folder):
    done = launch("study.py", folder / "configs")
    assert done.returncode == 0, done.stdout
    return {row["model"]: row for row in json.loads((folder / "runs/results.json").read_text())}


@pytest.mark.slow
def test_every_size_of_every_stage_has_a_row_beside_what_one_would_do_instead(results):
    origins = {name: row["origin"] for name, row in results.items()}
    assert origins == {
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
    sizes = {name: row["dim"] for name, row in results.items()}
    assert sizes["teacher"] == 32 and sizes["cosine-hpd"] == 16 and sizes["cosine-hpd-8"] == sizes["cosine-pca-8"] == 8
    assert results["cosine-hpd-8"]["forms"]["int8"]["bytes_per_vector"] == 8
    assert results["cosine-hpd-8"]["forms"]["binary"]["bytes_per_vector"] == 1


@pytest.mark.slow
def test_figures_are_those_of_the_models(results):
    assert results["teacher"]["fidelity"]["spearman"] == pytest.approx(1, abs=1e-4)
    assert results["cosine"]["fidelity"]["spearman"] > results["untrained-tiny-0-2"]["fidelity"]["spearman"]
    assert results["teacher-pca-16"]["fidelity"]["spearman"] > results["teacher-pca-8"]["fidelity"]["spearman"]
    assert results["one-layer"]["params"] < results["cosine"]["params"] < results["teacher"]["params"]
    assert results["cosine"]["sentences_per_second"] > 0 and results["untrained-tiny-0-2"]["sentences_per_second"] is None
    assert results["cosine"]["minutes"] > 0


@pytest.mark.slow
def test_differences_lie_in_their_intervals_and_are_of_the_rows_that_they_name(results):
    average = {name: row["forms"]["float32"]["sts"]["AVG"] for name, row in results.items()}
    for name, row in results.items():
        assert ("to_teacher" in row) == (name != "teacher")
        for key, other in (("to_teacher", "teacher"), ("to_origin", row["origin"])):
            if key in row:
                low, high = row[key]["ci"]
                assert row[key]["difference"] == pytest.approx(average[name] - average[other])
                assert low <= row[key]["difference"] <= high
        assert "sts_resamples" not in row["forms"]["int8"] and abs(row["forms"]["int8"]["to_float32"]["difference"]) < 5


@pytest.mark.slow
def test_the_same_command_again_trains_and_measures_nothing(folder, results):
    watched = [*(folder / "runs").rglob("measured/*.json"), *(folder / "runs").rglob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in watched}
    done = launch("study.py", folder / "configs")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in watched} == before and len(before) > 8


@pytest.mark.slow
def test_the_table_and_the_plots_are_whole(folder, results):
    lines = (folder / "runs/table.md").read_text().splitlines()
    assert len(lines) == len(results) + 2 and len({line.count("|") for line in lines}) == 1
    assert markdown(list(results.values())).splitlines() == lines
    first, again = (
        [path.read_bytes() for path in draw(list(results.values()), where)] for where in (folder / "runs", folder / "sts")
    )
    assert first == again
    for svg in first:
        assert ElementTree.fromstring(svg).tag.endswith("svg")


@pytest.mark.parametrize(
    "lines, message",
    [
        (["shards_from: null"], "the same shards_from"),
        (["text: {max_sentences: 100}"], r"wants other shards than .*cosine.yaml: text.max_sentences: null -> 100"),
        (["evaluate: {sts: null}"], "measured otherwise"),
        (["name: another"], "is named like its file"),
    ],
)
def test_students_that_cannot_be_compared_are_refused(folder, lines, message):
    write(folder, "odd", *lines)
    try:
        with pytest.raises(ConfigError, match=message):
            configs_of(folder / "configs")
    finally:
        (folder / "configs/odd.yaml").unlink()


def test_a_study_without_held_out_sentences_or_sts_is_refused(folder):
    for override, message in (("text.held_out=0", "text.held_out is 0"), ("evaluate.sts=null", "evaluate.sts is missing")):
        with pytest.raises(ConfigError, match=message):
            configs_of(folder / "configs", None, [override])


def test_a_file_over_all_students_changes_all(folder, tmp_path):
    (tmp_path / "over.yaml").write_text("seed: 7\nckd: {lr: 0.5}\n")
    configs = configs_of(folder / "configs", tmp_path / "over.yaml", ["ckd.max_steps=2"])
    assert {(config.seed, config.ckd.lr, config.ckd.max_steps) for config in configs} == {(7, 0.5, 2)}


def test_what_is_stored_is_near_to_what_was_given_as_its_precision_allows():
    vectors = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    assert np.array_equal(stored(vectors, "float32", vectors), vectors)
    assert np.abs(stored(vectors, "float16", vectors) - vectors).max() < 2e-3
    steps = (vectors.max(axis=0) - vectors.min(axis=0)) / 255
    assert (np.abs(stored(vectors, "int8", vectors) - vectors) <= steps * 0.501).all()
    assert (np.abs(stored(vectors, "int8", vectors[:10]) - vectors) > steps).any()  # beyond the range it was calibrated on
    assert np.array_equal(stored(vectors, "binary", vectors), np.where(vectors > 0, 1, -1))
