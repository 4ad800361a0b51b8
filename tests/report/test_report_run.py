"""What a run cost and was made from, on figures small enough to add up by hand."""

import json

import numpy as np
import pytest
from conftest import write_config
from torch.utils.tensorboard import SummaryWriter

from distill.config import load_config
from distill.evaluation.beir import RetrievalSet
from distill.evaluation.index import forms_of
from distill.evaluation.retrieval import retrieval_scores
from distill.files import write_json
from distill.report.curves import MOST_POINTS, read_curves, stage_charts
from distill.report.quality import (
    detail_tables,
    headline,
    quality_charts,
    result_table,
    sets_table,
    small_vector_charts,
)
from distill.report.run import costs, duration, fates, short_config, strays, versions, watt_hours


@pytest.fixture
def config(tmp_path):
    return load_config(write_config(tmp_path, tmp_path / "encoder"))


def sessions(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"work": "w", "host": "h", "device": "D", "ranks": 1, "joules": {}, "versions": {"torch": "1"}}
    (folder / "sessions.jsonl").write_text("".join(json.dumps({**usual, **line}) + "\n" for line in lines))


def test_tasks_side_by_side_take_the_time_of_the_longest_and_the_devices_of_all(config):
    sessions(
        config.precompute_dir,
        {"started": 100, "seconds": 50, "joules": {"gpu": 3600.0, "cpu": 10.0}},
        {"started": 110, "seconds": 60, "joules": {"gpu": 3600.0}},
        {"started": 500, "seconds": 5, "joules": {"gpu": 0.0}},
    )
    line, whole = costs(config)
    assert (line.stage, line.seconds, line.device_seconds) == ("precompute", 75, 115)
    assert line.energy == "2.00 Wh (GPU)"  # the processor did not tell everywhere
    assert (whole.seconds, whole.device_seconds, whole.energy) == (75, 115, "2.00 Wh (GPU)")


def test_training_counts_its_seconds_through_kills(config):
    sessions(config.run_dir / "ckd", {"started": 0, "seconds": 30, "ranks": 4})
    write_json(config.run_dir / "ckd/DONE.json", {"results": {"seconds": 90.0}, "config": {}, "inputs": {}})
    line = costs(config)[0]
    assert (line.seconds, line.device_seconds, line.devices) == (90.0, 120, "4 \N{MULTIPLICATION SIGN} D")
    assert line.energy == "not told by the device"


def test_versions_that_differ_name_their_stages(config):
    sessions(config.run_dir / "ckd", {"started": 0, "seconds": 1})
    sessions(config.run_dir / "hpd", {"started": 0, "seconds": 1, "versions": {"torch": "2", "numpy": "3"}})
    assert versions(config) == [("torch", [("1", "ckd"), ("2", "hpd")]), ("numpy", [("3", "")])]


def test_a_stage_of_another_config_is_named(config):
    (config.run_dir / "evaluate").mkdir(parents=True)
    write_json(config.run_dir / "evaluate/DONE.json", {"config": {"seed": 7}, "inputs": {}})
    (found,) = strays(config)
    assert found.startswith("evaluate: ") and "seed: 7 -> 0" in found


def test_the_short_recipe_gives_the_whole_config_again(config, tmp_path):
    for number, overrides in enumerate([[], ["finetune.temperature.learnable=true"], ["ckd.weights={mse: 1}", "seed=3"]]):
        changed = load_config(tmp_path / "run.yaml", overrides)
        path = tmp_path / f"short-{number}.yaml"
        path.write_text(short_config(changed))
        assert load_config(path) == changed


def test_fates_are_shares_of_what_was_read():
    counts = {"read": 10, "kept": 6, "duplicates": 3, "too_short": 0, "something_new": 1}
    found = {words: (count, share) for words, count, share in fates({"counts": counts})}
    assert found["kept, and embedded for training"] == (6, 0.6) and found["something_new"] == (1, 0.1)
    assert len(found) == 3


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (None, "not recorded"),
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (11220, "3 h 07 min"),
    ],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_energy_is_in_watt_hours():
    assert watt_hours(1800) == "0.50 Wh" and watt_hours(7.2e6) == "2.0 kWh"


def row(**changes):
    return {"dim": 4, "params": 10, "bytes_per_vector": 16, "sentences_per_second": 5.0, **changes}


def test_the_best_student_of_a_column_is_marked_and_never_the_teacher():
    results = {
        "ckd": row(fidelity={"spearman": 0.5, "spearman_top50": 0.30004}),
        "teacher": row(params=9, sentences_per_second=50.0, fidelity={"spearman": 1.0, "spearman_top50": 1.0}),
        "hpd": row(params=11, bytes_per_vector=8, fidelity={"spearman": 0.4, "spearman_top50": 0.30001}),
    }
    table = result_table(results)
    marked = {
        (name, column) for name, cells in table.rows for column, cell in zip(table.columns, cells, strict=True) if cell.best
    }
    assert [name for name, _ in table.rows] == ["teacher", "ckd", "hpd"]
    assert marked == {("ckd", "parameters"), ("hpd", "bytes a vector"), ("ckd", "Spearman, all pairs")}  # equal figures: none


def test_nested_sizes_are_joined_to_their_model_and_the_teacher_is_the_level():
    results = {
        name: row(bytes_per_vector=size, dim=size // 4, fidelity={"spearman_top50": 0.1 * number})
        for number, (name, size) in enumerate([("teacher", 64), ("ckd", 64), ("hpd", 32), ("hpd-4", 16)])
    }
    chart, _ = quality_charts(results)
    assert [(series.name, [point.x for point in series.points]) for series in chart.series] == [
        ("teacher", [64]),
        ("ckd", [64]),
        ("hpd", [16, 32]),
    ]
    assert chart.level == ("teacher", 0.0)


def test_small_vectors_of_a_retrieval_set_are_charted_and_tabulated_as_they_were_measured():
    pytest.importorskip("faiss")
    documents = {str(number): f"document {number}" for number in range(40)}
    queries = {name: f"query {name}" for name in "abc"}
    given = RetrievalSet(documents, queries, {"a": {"1": 1}, "b": {"2": 2}, "c": {"3": 1}})
    forms = forms_of([], ["int8", "binary"], 2)
    results = {}
    for seed, name in enumerate(["teacher", "ckd"]):
        draw = np.random.default_rng(seed)
        scores = retrieval_scores(lambda texts, draw=draw: draw.normal(size=(len(texts), 16)), {"found": given}, forms=forms)
        results[name] = row(dim=16, bytes_per_vector=64, **scores)
    (chart,) = small_vector_charts(results)
    (series,) = chart.series
    scores = results["ckd"]["retrieval"]["found"]
    assert [(point.x, point.label) for point in series.points] == [(2, "binary"), (16, "int8"), (64, "float32")]
    assert [point.y for point in series.points] == [scores["binary"]["ndcg@10"], scores["int8"]["ndcg@10"], scores["ndcg@10"]]
    assert chart.level == ("teacher, float32", results["teacher"]["retrieval"]["found"]["ndcg@10"])
    quality, cost = detail_tables(results)
    assert [name for name, _ in quality.rows] == ["teacher"] * 6 + ["ckd"] * 6 and "index MB" in cost.columns
    assert sets_table(results).columns == ["found ndcg@10"]
    assert small_vector_charts({"ckd": row()}) == []


def test_a_student_that_has_collapsed_is_shown_as_such():
    nan = float("nan")
    collapsed = row(sts={"STSB": nan, "AVG": nan, "AVG_OF": ["STSB"]}, sts_ci={"AVG": [nan, nan]})
    results = {"teacher": row(sts={"STSB": 80.0, "AVG": 80.0, "AVG_OF": ["STSB"]}), "ckd": collapsed}
    assert all("circle" in chart.svg() for chart in quality_charts(results))
    assert headline(results, "ckd")[0][0] == "nan"
    cells = dict(result_table(results).rows)["ckd"]
    assert "nan" in [cell.text for cell in cells] and not any(cell.best for cell in cells)


def test_a_run_without_a_teacher_or_held_out_sentences_has_its_figures_too():
    results = {"ckd": row()}
    assert quality_charts(results) == [] and len(result_table(results).rows) == 1
    assert [figure for figure, _ in headline(results, "ckd")] == ["16", "10", "5"]


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
    (chart,) = stage_charts("ckd", curves, {})
    points = chart.series[0].points
    assert len(points) == MOST_POINTS and points[0].y == pytest.approx(2.5) and "mean of 4" in chart.note
    assert read_curves(tmp_path / "none") == {}
