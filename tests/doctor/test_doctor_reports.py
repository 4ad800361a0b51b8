"""Reports over the run directory, and what a run is estimated to need."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from conftest import sentences, write_config
from healthy import start_of
from reference_times import hang_limit
from transformers import AutoModel

from distill.config import load_config
from distill.doctor import inputs
from distill.doctor.needs import disk_needed, num_parameters, num_sentences, teacher_width
from distill.doctor.notices import Notices
from distill.doctor.storage import look, mount_of
from distill.files import write_json


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def wait_for(condition):
    deadline = time.monotonic() + hang_limit()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_rank_says_last_is_heard_and_nothing_is_left(tmp_path):
    folder = tmp_path / "run/.doctor/1"
    first, second = Notices(folder, 0), Notices(folder, 1)
    for each in (first, second):
        each.start()
    second.say({"host": "n2"})
    wait_for(lambda: 1 in first.heard)
    second.say({"host": "n2", "facts": {}})
    wait_for(lambda: "facts" in first.heard[1])
    assert first.heard[1] == {"host": "n2", "facts": {}, "is_locked": True}
    first.close()
    wait_for(lambda: second.is_over)
    second.close()
    assert second.has_heard and list((tmp_path / "run").iterdir()) == []


def test_the_report_of_a_killed_start_is_not_believed(tmp_path):
    (tmp_path / "1").mkdir()
    write_json(tmp_path / "1/asked.json", {"number": "old"})
    write_json(tmp_path / "1/1.json", {"number": "old", "report": {"host": "n2", "facts": {}}})
    first = Notices(tmp_path / "1", 0)
    first.start()
    wait_for(lambda: json.loads((tmp_path / "1/asked.json").read_text())["number"] != "old")
    time.sleep(0.5)
    assert first.heard == {}
    first.close()


def test_a_rank_that_answered_a_killed_start_answers_again(tmp_path):
    (tmp_path / "1").mkdir()
    write_json(tmp_path / "1/asked.json", {"number": "old"})
    first, second = Notices(tmp_path / "1", 0), Notices(tmp_path / "1", 1)
    second.say({"host": "n2"})
    second.start()
    wait_for((tmp_path / "1/1.json").exists)
    first.start()
    wait_for(lambda: first.heard.get(1) == {"host": "n2", "is_locked": True})
    first.close()
    second.close()


def test_a_rank_takes_its_answer_away_where_rank_0_was_killed(tmp_path):
    (tmp_path / "1").mkdir()
    write_json(tmp_path / "1/asked.json", {"number": "old"})
    second = Notices(tmp_path / "1", 1)
    second.say({"host": "n2"})
    second.start()
    wait_for((tmp_path / "1/1.json").exists)
    second.close()
    assert not (tmp_path / "1/1.json").exists()


def test_what_killed_starts_left_is_removed_once_it_is_old(tmp_path):
    for name, age in (("old", 7200), ("other", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "asked.json").write_text("{}")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    first = Notices(tmp_path / "1", 0)
    first.start()
    wait_for((tmp_path / "1/asked.json").exists)
    first.close()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_file_system_without_locks_is_found(config, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "Function not implemented" in look(start_of(config))["lock"]


def test_mount_points_are_whole_folders():
    assert mount_of(Path("/dev/shm/none"))[0] == "/dev/shm"
    assert mount_of(Path("/proc/self"))[1].startswith("proc")


def test_needs_are_those_of_the_models_and_the_text(config, tiny_encoder):
    run = load_config(config)
    whole = sum(parameter.numel() for parameter in AutoModel.from_pretrained(tiny_encoder).parameters())
    layer = sum(p.numel() for p in AutoModel.from_pretrained(tiny_encoder).encoder.layer[0].parameters())
    assert num_parameters(load_config(config, ["student.layers=null"])) == whole
    assert num_parameters(run) == whole - layer  # layers 0 and 2 of three
    assert teacher_width(run) == 32
    in_file = sum(len(line) + 1 for line in sentences(600)) / (110 + 1)  # with line breaks
    assert num_sentences(run) == pytest.approx(in_file + run.text.held_out, abs=2)
    assert num_sentences(load_config(config, ["text.max_sentences=5"])) == 5 + run.text.held_out


def test_what_is_there_already_needs_no_room(config, tiny_encoder):
    run = load_config(config)
    needed, words = disk_needed(run)
    assert "shards" in words and "checkpoints" in words
    run.shards_dir.mkdir(parents=True)
    (run.shards_dir / "manifest.json").write_text("{}")
    assert disk_needed(run)[0] == pytest.approx(needed - num_sentences(run) * (220 + 64))
    for stage in ("ckd", "finetune", "hpd"):
        write = run.run_dir / stage
        write.mkdir()
        (write / "DONE.json").write_text("{}")
    assert disk_needed(run)[0] == 0


def test_needs_that_cannot_be_known_are_said_to_be_unknown(config):
    hub = load_config(config, ["student.init=owner/model", "student.layers=null"])
    assert disk_needed(hub) == (None, "not known (checkpoints and students)")
    endless = load_config(config, ["text.sources=[{type: python-docs}]"])
    assert disk_needed(endless) == (None, "not known (shards)")


def test_of_many_files_two_are_opened_and_all_are_counted(config):
    for number in range(40):
        (config.parent / f"part-{number:02d}.txt").write_text("a sentence that is long enough\n")
    many = start_of(config, 1, f"text.sources=[{{type: file, path: {config.parent}/part-*.txt}}]")
    found = inputs.look(many)
    assert found["errors"] == {} and found["sizes"][f"{config.parent}/part-*.txt"] == 40 * 31
    (config.parent / "part-39.txt").write_bytes(b"\xff\xfe")
    assert "part-39.txt" in inputs.look(many)["errors"]["text.sources[0]"]
