"""The whole pipeline on a few hundred sentences: two DeepSpeed ranks, every stage, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from browser import browser, keep_screenshot, tensorboard, until_visible
from commands import ROOT, call, environment, launch
from conftest import write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import load_config
from distill.training.dashboard import CHARTS, CLOSED, SOURCES, STS, charts_of


def test_every_stage_leaves_done_json_and_the_table_is_printed(finished):
    _, run, printed = finished
    for stage in ("precompute", "ckd", "finetune", "hpd", "export", "evaluate"):
        assert json.loads((run / stage / "DONE.json").read_text())["stage"] == stage
    results = json.loads((run / "evaluate/results.json").read_text())
    assert results.pop("version") == 1 and results.pop("self")
    assert set(results) == {"teacher", "ckd", "finetune", "hpd", "hpd-8"}
    assert results["teacher"]["fidelity"]["spearman"] > 0.99  # fp16 vectors of a random encoder lie close
    assert results["hpd-8"]["dim"] == 8 and results["hpd-8"]["bytes_per_vector"] == 32
    for name in results:
        assert name in printed


def test_training_brought_the_student_nearer_to_the_teacher(finished):
    _, run, _ = finished
    similarity = {event.step: event.value for event in scalars(run, "ckd")["similarity/positive"]}
    assert similarity[12] > similarity[1]


def scalars(run, stage):
    events = EventAccumulator(str(run / "tensorboard" / stage))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_and_the_usual_tags(finished):
    _, run, _ = finished
    logged = scalars(run, "ckd")
    assert [event.step for event in logged["loss"]] == list(range(1, 13))
    for tag in ("temperature", "learning_rate", "gradient_norm", "texts_per_second", "similarity/positive",
                "similarity/hardest_negative", "dev/fidelity/spearman"):  # fmt: skip
        assert logged[tag], tag


def test_the_teachers_dev_score_is_measured_in_precompute_and_drawn_in_every_stage(finished):
    _, run, _ = finished
    kept = json.loads((run / "precompute/teacher_dev.json").read_text())["STSB-dev"]
    assert kept == pytest.approx(json.loads((run / "evaluate/results.json").read_text())["teacher"]["sts"]["STSB"], abs=60)
    for stage in ("ckd", "finetune", "hpd"):
        logged = scalars(run, stage)
        dev_steps = [event.step for event in logged["dev/score"]]
        for tag, value in (("teacher/fidelity", 1), ("teacher/sts/STSB-dev", kept)):
            points = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in logged[tag]]
            assert points == [(step, value) for step in dev_steps]


@pytest.mark.slow
def test_a_browser_shows_the_charts_the_settings_and_the_projectors_points(finished, tmp_path):
    _, run, _ = finished
    with tensorboard(run.parent) as address, browser() as page:
        page.goto(f"{address}/#custom_scalars")
        settings = load_config(run / "config.yaml").model_dump()
        stages = [charts_of(settings[stage], SOURCES, STS) for stage in ("ckd", "finetune", "hpd")]
        shown = {chart for groups in stages for title, charts in groups.items() if title not in CLOSED for chart in charts}
        titles = CHARTS.keys() | shown

        def matches(found):
            return [int(text[9:-1]) for text in found if text.startswith("Matches (")]

        found = until_visible(page, titles, lambda found: min(matches(found), default=0) >= 1)
        assert len(matches(found)) == len(shown), "every chart has a line"
        keep_screenshot(page, "charts", tmp_path)
        page.goto(f"{address}/#hparams")
        until_visible(page, {"tiny/ckd", "tiny/finetune", "tiny/hpd", "stage", "ckd.lr", "best/score"})
        keep_screenshot(page, "hparams", tmp_path)
        page.goto(f"{address}/#text")
        until_visible(page, {"config/text_summary", "command/text_summary", "versions"})  # the third is closed
        keep_screenshot(page, "text", tmp_path)
        page.goto(f"{address}/#projector")
        projector = page.wait_for_selector("iframe[src*=projector]", state="attached")
        frame = projector.content_frame().wait_for_selector("iframe", state="attached").content_frame()
        rows = json.loads((run / "shards/held_out/manifest.json").read_text())["count"]
        until_visible(frame, {"Points:", str(rows), "Dimension:", "2 tensors found", "Color by"})
        keep_screenshot(page, "projector", tmp_path)
    lines = (run / "tensorboard/ckd/projector/sentences.tsv").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} == {"text.txt", "more.txt"}
    vectors = [np.loadtxt(run / f"tensorboard/ckd/projector/{space}.tsv") for space in ("student", "teacher")]
    assert [len(space) for space in vectors] == [rows, rows] == [len(lines) - 1] * 2
    assert np.linalg.norm(vectors[1], axis=1) == pytest.approx(np.ones(rows), abs=0.01)


def test_a_second_start_of_a_finished_run_does_nothing(finished):
    config, run, _ = finished
    written = times_of_writing(run)
    again = call("pipeline.py", "--config", config)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert times_of_writing(run) == written


def times_of_writing(run):
    """Of every file of a run but config.yaml, the record of the last command."""
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}


@pytest.mark.slow
def test_a_changed_config_runs_what_depends_on_it_and_prints_why(finished, tmp_path):
    config, run, _ = finished
    shutil.copytree(run, tmp_path / run.name)
    again = launch("pipeline.py", "--config", config, f"runs_dir={tmp_path}", "stages=[hpd]", "hpd.lr=0.01")
    assert again.returncode == 0 and "hpd: hpd.lr: 0.0002 -> 0.01" in again.stdout, again.stdout
    assert "the run on one page" not in again.stdout  # its table would be of the former student


def test_a_page_older_than_the_results_is_made_again_and_the_table_is_printed(finished, tmp_path):
    config, run, printed = finished
    shutil.copytree(run, tmp_path / run.name)
    page = tmp_path / run.name / "report.html"
    for left in ("old", "none"):
        os.utime(page, (0, 0)) if left == "old" else page.unlink()
        again = call("pipeline.py", "--config", config, f"runs_dir={tmp_path}")
        assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout
        assert page.stat().st_mtime > 0 and str(page) in again.stdout
    names = ("teacher", "ckd", "finetune", "hpd", "hpd-8")
    table = [line for line in printed.splitlines() if line.startswith(tuple(f"{name}  " for name in names))]
    assert [line.split()[0] for line in table] == list(names) and "\n".join(table) in again.stdout


def test_an_export_loads_without_this_project(finished):
    _, run, _ = finished
    code = (
        "import sys; sys.modules['distill'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"m = SentenceTransformer({str(run / 'export/hpd')!r}, device='cpu', truncate_dim=8)\n"
        "v = m.encode(['the model learns.', 'a queue of tensor.'])\n"
        "assert v.shape == (2, 8), v.shape\n"
        "print(m.similarity_fn_name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "cosine", done.stderr
    assert "Fidelity".lower() in (run / "export/hpd/README.md").read_text().lower()


def test_search_answers_from_the_runs_text(finished, tmp_path):
    run = shutil.copytree(finished[1], tmp_path / "2024")  # a name that YAML reads as a number
    question = (run / "precompute/text/000000.txt").read_text().splitlines()[0]
    done = launch("search.py", "--run", run, question)
    assert done.returncode == 0, done.stdout
    assert question in done.stdout.split("-----")[-1] and "ms with the student" in done.stdout


@pytest.mark.soak
def test_later_stages_run_from_shards_alone(finished, tmp_path, tiny_encoder):
    """Imported vectors replace the teacher, whose weights are not needed."""
    text = (finished[1].parents[1] / "text.txt").read_text().splitlines()
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(len(text), 48)).astype(np.float32))
    config = write_config(tmp_path, tiny_encoder)
    overrides = [f"teacher={{vectors: {tmp_path / 'vectors.npy'}}}", f"student.init={tiny_encoder}", "ckd.max_steps=3"]
    done = launch("pipeline.py", "--config", config, *overrides, "stages=[precompute, ckd, export, evaluate]")
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "runs/tiny/evaluate/results.json").read_text())
    assert set(results) == {"version", "self", "ckd"} and results["ckd"]["dim"] == 32


def test_simcse_needs_no_student_before_it(embedded_copy, tmp_path, tiny_encoder):
    config = write_config(
        tmp_path,
        tiny_encoder,
        stages="[simcse, export, evaluate]",
        simcse="{global_batch: 32, micro_batch: 8, max_steps: 6, save_every: 2, dev_every: 3, log_every: 1, dropout: 0.1}",
    )
    for script, *more in (("train.py", "stage=simcse"), ("export.py",), ("evaluate.py",)):
        done = call(script, "--config", config, "student.pooling=first_last_mean", *more)
        assert done.returncode == 0, done.stdout
    run = tmp_path / "runs/tiny"
    assert set(json.loads((run / "evaluate/results.json").read_text())) == {"version", "self", "teacher", "simcse"}
    logged = scalars(run, "simcse")
    assert [event.step for event in logged["loss"]] == list(range(1, 7))
    assert logged["similarity/positive"][-1].value < 0.9999
