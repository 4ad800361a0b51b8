"""Invalid input: one clear message, a non-zero exit, no partial files."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import call, command, deepspeed, environment, kill_group_when, launch
from conftest import make_encoder, write_config
from reference_times import hang_limit, starts
from training_processes import start_training

from distill.run.heartbeats import SILENCE

pytestmark = pytest.mark.slow


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode not in (0, None), done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    for part in parts:
        assert part in errors[0], errors[0]


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


def test_no_such_config(tmp_path):
    refused(call("pipeline.py", "--config", tmp_path / "none.yaml"), "no config at")


def test_unknown_key(tmp_path, tiny_encoder):
    refused(call("pipeline.py", "--config", write_config(tmp_path, tiny_encoder), "ckd.lrr=1"), "did you mean lr?")
    assert not (tmp_path / "runs").exists()


def test_empty_text(tmp_path, tiny_encoder):
    (tmp_path / "text.txt").write_text("\n\n")
    refused(call("precompute.py", "--config", write_config(tmp_path, tiny_encoder)), "no text is left")
    assert not (tmp_path / "runs/tiny/shards").exists() and not partial_files(tmp_path / "runs")


def test_text_that_is_not_utf8(tmp_path, tiny_encoder):
    (tmp_path / "text.txt").write_bytes(b"a good line\nanother\n\xff\xfe bad\n")
    refused(call("precompute.py", "--config", write_config(tmp_path, tiny_encoder)), "text.txt", "line 3", "UTF-8")


def test_a_folder_that_holds_no_model(tmp_path, tiny_encoder):
    (tmp_path / "empty").mkdir()
    config = write_config(tmp_path, tmp_path / "empty")
    refused(call("precompute.py", "--config", config), "no model at", "config.json")


def test_more_layers_than_the_teacher_has_before_it_has_worked(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    refused(call("pipeline.py", "--config", config, "student.layers=9"), "student.layers 9: the encoder has 3")
    refused(call("pipeline.py", "--config", config, "student.layers=[0, 5]"), "the encoder has layers 0 to 2")
    assert not (tmp_path / "runs").exists()


def test_teacher_and_shards_of_different_width(embedded_copy):
    refused(call("train.py", "--config", embedded_copy[0], "ckd.projection_width=77"), "ckd.projection_width 77", "width 32")


def test_shards_made_by_another_teacher(embedded_copy, tmp_path):
    other = make_encoder(tmp_path / "other", seed=1)
    refused(call("train.py", "--config", embedded_copy[0], f"teacher.model={other}"), "another teacher", "teacher.model")


def test_a_run_directory_of_another_config(embedded_copy):
    refused(
        call("precompute.py", "--config", embedded_copy[0], "text.min_chars=20"),
        "begun with another",
        "text.min_chars: 1 -> 20",
    )


def test_an_unfinished_stage_of_another_config(embedded_copy, tmp_path):
    config, directory = embedded_copy
    kill_group_when(
        command("train.py", "--config", config, "ckd.max_steps=400", "ckd.epochs=99"),
        lambda: any((directory / "ckd/checkpoints").glob("step-????????/COMPLETE.json")),
    )
    refused(call("train.py", "--config", config, "ckd.max_steps=400", "ckd.epochs=99", "ckd.lr=0.1"), "ckd.lr: 0.001 -> 0.1")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_shard(embedded_copy, damage):
    config, directory = embedded_copy
    shard = directory / "shards/000001.tar"
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    refused(call("train.py", "--config", config), "000001.tar", "repair")


def test_a_read_only_run_directory(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    place = tmp_path / "readonly"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a read-only file system: {mounted.stderr.strip()}")
    try:
        refused(call("pipeline.py", "--config", config, f"runs_dir={place}"), "Read-only", "runs_dir=")
    finally:
        subprocess.run(["umount", str(place)], check=True)


LONG = ["ckd.max_steps=400", "ckd.epochs=100", "ckd.dev_every=400", "ckd.save_every=400"]


def little_space(limit: int) -> None:
    """The system refuses files above `limit` bytes, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    "script, arguments, limit, name",
    [
        ("train.py", ["stage=ckd"], 60_000, "ckd/student.part"),
        ("train.py", ["stage=ckd", *LONG], 400_000, "tensorboard/ckd"),
        ("train.py", ["stage=finetune", "finetune.num_mined=2000"], 20_000, "finetune/triplets.npy"),
        ("train.py", ["stage=hpd", "hpd.freeze_encoder=true"], 20_000, "hpd/cache"),
        ("export.py", [], 60_000, "export/ckd.part"),
        ("evaluate.py", [], 20_000, "evaluate/index.npy"),
    ],
    ids=["student", "curves", "triplets", "cache", "export", "index"],
)
def test_a_full_disk_is_one_line_with_the_file(finished, tmp_path, script, arguments, limit, name):
    config, run, _ = finished
    shutil.copytree(run, tmp_path / "tiny")
    stage = name.split("/")[1 if name.startswith("tensorboard") else 0]
    shutil.rmtree(tmp_path / "tiny" / stage)
    before = partial(little_space, limit)
    done = call(script, "--config", config, f"runs_dir={tmp_path}", *arguments, before=before)
    refused(done, name, "File too large")
    assert done.returncode == 2


def test_a_full_disk_while_text_is_prepared_is_one_line_with_the_file(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    done = call("precompute.py", "--config", config, "--text-only", before=partial(little_space, 5_000))
    refused(done, "precompute/", "texts", "File too large")
    assert done.returncode == 2


def test_disk_full_while_writing_a_shard(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        assert call("precompute.py", "--config", config, f"runs_dir={place}", "--text-only").returncode == 0
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        (place / "ballast").write_bytes(bytes(max(0, free - 30_000)))
        refused(call("precompute.py", "--config", config, f"runs_dir={place}"), "No space left", "free some space")
        assert not list(place.glob("tiny/shards/*.part")) and not (place / "tiny/shards/manifest.json").exists()
        (place / "ballast").unlink()
        assert call("precompute.py", "--config", config, f"runs_dir={place}").returncode == 0
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.soak
def test_ctrl_c_in_training_and_a_later_run_continues(embedded_copy):
    config, directory = embedded_copy
    started = ["--config", config, "stages=[ckd]", "ckd.max_steps=60", "ckd.epochs=99"]
    printed = kill_group_when(
        command("pipeline.py", *started),
        lambda: any((directory / "ckd/checkpoints").glob("step-????????/COMPLETE.json")),
        signum=signal.SIGINT,
    )
    assert "continues from here" in printed and not (directory / "ckd/DONE.json").exists()
    again = launch("pipeline.py", *started)
    assert again.returncode == 0 and "continuing after step" in again.stdout, again.stdout


def test_ctrl_c_in_precompute_and_a_later_run_continues(tmp_path, tiny_encoder):
    config = write_config(tmp_path, tiny_encoder)
    directory = tmp_path / "runs/tiny"
    kill_group_when(
        command("precompute.py", "--config", config), (directory / "shards/000000.tar").exists, signum=signal.SIGINT
    )
    assert not (directory / "precompute/DONE.json").exists() and not partial_files(directory)
    first = (directory / "shards/000000.tar").stat().st_mtime_ns
    assert call("precompute.py", "--config", config).returncode == 0
    assert (directory / "shards/000000.tar").stat().st_mtime_ns == first


@pytest.mark.serial
def test_a_port_in_use(embedded_copy):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        port = bound.getsockname()[1]
        started = time.monotonic()
        done = subprocess.run(
            deepspeed(2, "--config", embedded_copy[0], port=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            timeout=hang_limit(),
        )
    refused(done, f"port {port} is in use", "--master_port")
    assert done.returncode == 1, "under Slurm the next start takes another port"
    assert time.monotonic() - started < starts(8)


@pytest.mark.soak
@pytest.mark.serial
def test_one_rank_failing_ends_the_other_within_seconds(embedded_copy):
    config, directory = embedded_copy
    with start_training("deepspeed", 2, config, "ckd.max_steps=4000", "ckd.epochs=999") as training:
        training.wait_for(directory, "ckd/checkpoints/step-????????/COMPLETE.json")
        os.kill(training.ranks()[1], signal.SIGKILL)
        assert training.wait(SILENCE + starts(2)) != [0]


def test_imported_vectors_of_another_length(tmp_path, tiny_encoder):
    np.save(tmp_path / "vectors.npy", np.ones((5, 8), np.float32))
    config = write_config(tmp_path, tiny_encoder)
    overrides = [f"teacher={{vectors: {tmp_path / 'vectors.npy'}}}", f"student.init={tiny_encoder}"]
    refused(call("precompute.py", "--config", config, *overrides), "5 rows", "600 raw texts")


def test_a_stage_before_its_input(embedded_copy):
    refused(call("train.py", "--config", embedded_copy[0], "stage=hpd"), "hpd needs", "run that stage first")
