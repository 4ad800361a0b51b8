"""What a node collects, and what a run is estimated to need."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import sentences, write_config
from facts import HEALTHY, context_of
from transformers import AutoModel

from distill.config import load_config
from distill.doctor import inputs, storage
from distill.doctor.diagnosis import CHECKS
from distill.doctor.exchange import collect
from distill.doctor.needs import disk_needed, num_parameters, num_sentences


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def test_collect_returns_the_same_checks_and_keys_as_the_healthy_facts(config):
    facts = collect(context_of(config, 1, started=time.monotonic()), 1.0)
    assert facts.keys() == HEALTHY.keys() == {check.name for check in CHECKS}
    for check, expected in HEALTHY.items():
        assert facts[check].keys() == expected.keys(), facts[check]
    assert list((config.parent / "runs/tiny").iterdir()) == []


def test_a_check_that_hangs_or_raises_leaves_the_others(config, monkeypatch):
    released = threading.Event()
    broken = {"limits": lambda context: released.wait(), "shm": lambda context: 1 / 0}
    changed = [replace(check, collect=broken.get(check.name, check.collect)) for check in CHECKS if not check.imports]
    monkeypatch.setattr("distill.doctor.exchange.CHECKS", changed)
    facts = collect(context_of(config, 1, started=time.monotonic(), timeout=10.0), 0.5)
    released.set()
    failed = {name: (found["cause"], found["failed"]) for name, found in facts.items() if "failed" in found}
    assert failed == {"limits": ("time", "not done after 5 s"), "shm": ("error", "ZeroDivisionError: division by zero")}


def test_another_rank_finds_the_marker_of_rank_0_and_its_lock(config, tmp_path):
    context = context_of(config)
    facts = storage.collect(context)
    elsewhere = context_of(config, 2, f"runs_dir={tmp_path / 'elsewhere'}")
    with storage.marker(context, facts) as name:
        assert storage.check_marker(context, name) == {"is_shared": True, "is_locked": True}
        assert storage.check_marker(elsewhere, name) == {"is_shared": False}
        (context.config.run_dir / ".doctor-unlocked").touch()
        assert storage.check_marker(context, ".doctor-unlocked") == {"is_shared": True, "is_locked": False}
    with storage.marker(context, facts | {"error": "Read-only file system"}) as name:
        assert name == "" and storage.check_marker(context, name) == {}


def test_old_files_of_a_killed_doctor_are_deleted(config):
    context = context_of(config)
    facts = storage.collect(context)
    for name, age in ((".doctor-old.part", 7200), (".doctor-new.part", 0)):
        path = context.config.run_dir / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    with storage.marker(context, facts):
        pass
    assert [path.name for path in context.config.run_dir.iterdir()] == [".doctor-new.part"]


def test_a_file_system_without_locks_is_found(config, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "Function not implemented" in storage.collect(context_of(config))["lock"]


def test_mount_points_are_whole_folders():
    assert storage.mount_of(Path("/dev/shm/none"))[0] == "/dev/shm"
    assert storage.mount_of(Path("/proc/self"))[1].startswith("proc")


def test_needs_are_those_of_the_models_and_the_text(config, tiny_encoder):
    run = load_config(config)
    encoder = AutoModel.from_pretrained(tiny_encoder)
    whole = sum(parameter.numel() for parameter in encoder.parameters())
    layer = sum(parameter.numel() for parameter in encoder.encoder.layer[0].parameters())
    assert num_parameters(load_config(config, ["student.layers=null"])) == whole
    assert num_parameters(run) == whole - layer  # layers 0 and 2 of three
    trimmed = load_config(config, ["student.layers=null", "student.vocabulary={from: text, size: 40}"])
    assert num_parameters(trimmed) == whole - (encoder.config.vocab_size - 40) * encoder.config.hidden_size
    in_file = sum(len(line) + 1 for line in sentences(600)) / (110 + 1)  # with line breaks
    assert num_sentences(run) == pytest.approx(in_file + run.text.held_out, abs=2)
    assert num_sentences(load_config(config, ["text.max_sentences=5"])) == 5 + run.text.held_out


def test_what_exists_already_needs_no_space(config):
    run = load_config(config)
    needed, words = disk_needed(run)
    assert "shards" in words and "checkpoints" in words
    run.shards_dir.mkdir(parents=True)
    (run.shards_dir / "manifest.json").write_text("{}")
    assert disk_needed(run)[0] == pytest.approx(needed - num_sentences(run) * (220 + 64))
    for stage in ("ckd", "finetune", "hpd"):
        folder = run.run_dir / stage
        folder.mkdir()
        (folder / "DONE.json").write_text("{}")
    assert disk_needed(run)[0] == 0


def test_a_frozen_encoder_s_vectors_of_all_texts_are_part_of_what_is_needed(config):
    run, frozen = (load_config(config, [f"hpd.freeze_encoder={value}"]) for value in (False, True))
    assert disk_needed(frozen)[0] - disk_needed(run)[0] == 2 * 32 * num_sentences(run)
    wide = load_config(config, ["hpd.freeze_encoder=true", "student.pooling=concat_last4_mean"])
    assert disk_needed(wide)[0] - disk_needed(run)[0] == 2 * 64 * num_sentences(run)  # of two layers


def test_needs_that_are_unknown_are_reported_as_unknown(config):
    hub = load_config(config, ["student.init=owner/model", "student.layers=null"])
    assert disk_needed(hub) == (None, "not known (checkpoints and students)")
    uncounted = load_config(config, ["text.sources=[{type: huggingface, name: owner/name, field: text}]"])
    assert disk_needed(uncounted) == (None, "not known (shards)")


def test_of_many_files_two_are_opened_and_all_are_counted(config):
    for number in range(40):
        (config.parent / f"part-{number:02d}.txt").write_text("a sentence that is long enough\n")
    many = context_of(config, 1, f"text.sources=[{{type: file, path: {config.parent}/part-*.txt}}]")
    found = inputs.collect(many)
    assert found["errors"] == {} and found["sizes"][f"{config.parent}/part-*.txt"] == 40 * 31
    (config.parent / "part-39.txt").write_bytes(b"\xff\xfe")
    assert "part-39.txt" in inputs.collect(many)["errors"]["text.sources[0]"]
