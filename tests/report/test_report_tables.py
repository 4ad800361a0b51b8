"""Tables and charts from files of a run, with values small enough to add up by hand."""

import json

import numpy as np
import pytest
from conftest import write_config
from torch.utils.tensorboard import SummaryWriter

from distill.config import load_config
from distill.corpus.evaluation_sets import RetrievalSet
from distill.evaluation.index_types import index_types
from distill.evaluation.retrieval import retrieval_scores
from distill.metrics.results import ModelResults
from distill.report.page import changed_stages, short_config
from distill.report.result_charts import result_charts
from distill.report.result_tables import headline, result_tables
from distill.report.run_tables import cost_table, status_table, version_table
from distill.report.training_charts import MAX_POINTS, read_curves, training_charts
from distill.run.files import write_json


@pytest.fixture
def config(tmp_path):
    return load_config(write_config(tmp_path, tmp_path / "encoder"))


def sessions(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"work": "w", "host": "h", "device": "D", "ranks": 1, "gpu_joules": None, "versions": {"torch": "1"}}
    (folder / "sessions.jsonl").write_text("".join(json.dumps({**usual, **line}) + "\n" for line in lines))


def test_sessions_side_by_side_take_the_time_in_which_any_ran_and_the_devices_of_all(config):
    sessions(
        config.precompute_dir,
        {"started": 100, "seconds": 50, "gpu_joules": 3600.0},
        {"started": 110, "seconds": 60, "gpu_joules": 3600.0},
        {"started": 500, "seconds": 5, "gpu_joules": 0.0},
    )
    assert cost_table(config).rows == [
        ["precompute", "1 \N{MULTIPLICATION SIGN} D", "75 s", "115 s", "2.00 Wh"],
        ["all stages", "", "75 s", "115 s", "2.00 Wh"],
    ]


def test_training_counts_its_seconds_through_kills_and_a_session_without_energy_leaves_none(config):
    measured = {"started": 60, "seconds": 10, "gpu_joules": 7.0}
    sessions(config.run_dir / "ckd", {"started": 0, "seconds": 30, "ranks": 4}, measured)
    write_json(config.run_dir / "ckd/DONE.json", {"results": {"seconds": 90.0}, "config": {}, "inputs": {}})
    devices = "4 \N{MULTIPLICATION SIGN} D, 1 \N{MULTIPLICATION SIGN} D"
    assert cost_table(config).rows[0] == ["ckd", devices, "90 s", "2.17 min", "-"]


def test_versions_that_differ_name_their_stages(config):
    assert version_table(config) is None
    sessions(config.run_dir / "ckd", {"started": 0, "seconds": 1})
    sessions(config.run_dir / "hpd", {"started": 0, "seconds": 1, "versions": {"torch": "2", "numpy": "3"}})
    assert version_table(config).rows == [["torch", "1 (ckd), 2 (hpd)"], ["numpy", "3"]]


def test_a_stage_of_another_config_is_named(config):
    (config.run_dir / "evaluate").mkdir(parents=True)
    write_json(config.run_dir / "evaluate/DONE.json", {"settings": {"evaluate": {"num_held_out": 7}}, "inputs": {}})
    (found,) = changed_stages(config)
    assert found.startswith("evaluate: ") and "evaluate.num_held_out: 7 -> " in found


def test_the_short_recipe_gives_the_whole_config_again(config, tmp_path):
    for number, overrides in enumerate([[], ["finetune.temperature.learnable=true"], ["ckd.weights={mse: 1}", "seed=3"]]):
        changed = load_config(tmp_path / "run.yaml", overrides)
        path = tmp_path / f"short-{number}.yaml"
        path.write_text(short_config(changed))
        assert load_config(path) == changed


def test_the_status_of_texts_is_a_percentage_of_those_read():
    counts = {"kept": 6, "read": 10, "duplicates": 3, "too_short": 0, "something_new": 1}
    assert status_table({"counts": counts}).rows == [
        ["kept, and embedded for training", "6", "60.0%"],
        ["dropped: the same as an earlier text", "3", "30.0%"],
        ["something_new", "1", "10.0%"],
    ]


def row(**changes):
    if "fidelity" in changes:
        changes["fidelity"] = {"spearman": 0.5, "spearman_top50": 0.5, "top10": 0.5, "texts": 9} | changes["fidelity"]
    return ModelResults(**{"dim": 4, "params": 10, "bytes_per_vector": 16, "texts_per_second": 5.0} | changes)


def test_the_best_student_of_a_column_is_marked_never_the_teacher_and_none_of_equal_values():
    results = {
        "ckd": row(fidelity={"spearman": 0.5, "spearman_top50": 0.30004}),
        "teacher": row(params=9, texts_per_second=50.0, fidelity={"spearman": 1.0, "spearman_top50": 1.0}),
        "hpd": row(params=11, bytes_per_vector=8, fidelity={"spearman": 0.4, "spearman_top50": 0.30001}),
    }
    (table,) = result_tables(results)
    cells = [(name, column, cell) for name, *rest in table.rows for column, cell in zip(table.header[1:], rest, strict=True)]
    marked = {(name, column) for name, column, cell in cells if cell.best}
    assert [name for name, *_ in table.rows] == ["teacher", "ckd", "hpd"]
    assert marked == {("ckd", "parameters"), ("hpd", "bytes per vector"), ("ckd", "Spearman, all pairs")}


def test_nested_sizes_are_joined_to_their_model_against_size_and_left_out_against_speed():
    results = {
        name: row(bytes_per_vector=size, dim=size // 4, fidelity={"spearman_top50": 0.1 * number})
        for number, (name, size) in enumerate([("teacher", 64), ("ckd", 64), ("hpd", 32), ("hpd-4", 16)])
    }
    by_size, by_speed = result_charts(results)
    shown = {name: [(point.x, point.label) for point in points] for name, points in by_size.series.items()}
    assert shown == {"teacher": [(64, "")], "ckd": [(64, "")], "hpd": [(16, "4"), (32, "8")]}
    assert list(by_speed.series) == ["teacher", "ckd", "hpd"]


def test_quantised_vectors_of_a_retrieval_set_are_charted_and_tabulated_as_they_were_measured():
    pytest.importorskip("faiss")
    documents = {str(number): f"document {number}" for number in range(40)}
    queries = {name: f"query {name}" for name in "abc"}
    given = RetrievalSet(documents, queries, {"a": {"1": 1}, "b": {"2": 2}, "c": {"3": 1}})
    types = index_types([], ["int8", "binary"], 2)
    results = {}
    for seed, name in enumerate(["teacher", "ckd"]):
        draw = np.random.default_rng(seed)

        def encode(texts, side, draw=draw):
            return draw.normal(size=(len(texts), 16))

        scores = retrieval_scores(encode, {"found": given}, types=types)
        results[name] = row(dim=16, bytes_per_vector=64, **scores)
    (chart,) = result_charts(results)
    scores = results["ckd"].retrieval["found"]
    points = chart.series["ckd"]
    assert [(point.x, point.label) for point in points] == [(2, "binary"), (16, "int8"), (64, "float32")]
    assert [point.y for point in points] == [scores["binary"]["ndcg@10"], scores["int8"]["ndcg@10"], scores["ndcg@10"]]
    assert all(low <= y <= high for _, y, (low, high), _ in points)
    _, sets, quality, cost = result_tables(results)
    assert sets.header == ["model", "found ndcg@10"] and "index MB" in cost.header
    assert [name for name, *_ in quality.rows] == ["teacher"] * 6 + ["ckd"] * 6


def test_a_student_that_has_collapsed_is_shown_as_such():
    nan = float("nan")
    collapsed = row(sts={"STSB": nan, "AVG": nan, "AVG_OF": ["STSB"]}, sts_ci={"AVG": [nan, nan]})
    results = {"teacher": row(sts={"STSB": 80.0, "AVG": 80.0, "AVG_OF": ["STSB"]}), "ckd": collapsed}
    for chart in result_charts(results):
        assert "teacher: 80" in chart.html() and "ckd: nan" not in chart.html()
    assert headline(results, "ckd")[0][0] == "nan"
    (shown,) = [rest for name, *rest in result_tables(results)[0].rows if name == "ckd"]
    assert "nan" in [cell.text for cell in shown] and not any(cell.best for cell in shown)


def test_a_run_without_a_teacher_or_held_out_texts_has_its_values_too():
    results = {"ckd": row()}
    assert result_charts(results) == [] and len(result_tables(results)[0].rows) == 1
    assert headline(results, "ckd") == [("16", "bytes per vector"), ("10", "parameters"), ("5", "texts per second")]


def test_curves_hold_every_step_once_after_a_resume_and_are_thinned_by_means(tmp_path):
    first = SummaryWriter(str(tmp_path))
    for step in range(1, 801):
        first.add_scalar("loss", 1000.0 if step > 600 else step, step)
    first.close()
    again = SummaryWriter(str(tmp_path), purge_step=601)
    for step in range(601, 1201):
        again.add_scalar("loss", float("nan") if step == 1200 else step, step)
    again.close()
    curves = read_curves(tmp_path)
    assert curves["loss"] == [(step, step) for step in range(1, 1200)]
    (chart,) = training_charts("ckd", curves, 600)
    points = chart.series["loss"]
    assert len(points) == MAX_POINTS and points[0].y == pytest.approx(2.5) and points[-1].x == 1199
    assert chart.vline == ("kept", 600)
    assert read_curves(tmp_path / "none") == {}


def test_a_stage_has_a_chart_for_loss_fidelity_sts_and_throughput():
    tags = [
        "loss",
        "reference_loss",
        "loss/ckd",
        "dev/fidelity/top10",
        "dev/sts/STSB-dev",
        "teacher/sts/STSB-dev",
        "texts_per_second",
    ]
    charts = training_charts("ckd", {tag: [(1, 1.0), (2, 2.0)] for tag in tags}, None)
    assert [list(chart.series) for chart in charts] == [
        ["loss", "reference loss"],
        ["10 nearest shared"],
        ["STSB-dev", "teacher, STSB-dev"],
        ["texts per second"],
    ]
