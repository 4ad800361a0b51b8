"""Shards are a function of text and teacher: not of the number of tasks, nor of interruptions."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from commands import call
from conftest import make_encoder, sentences, write_config, write_pairs
from reference_times import hang_limit

from distill.config import load_config, stage_of
from distill.corpus import HELD_OUT_MODULUS, text_hash
from distill.run.throughput import Timing
from distill.shards import ShardReader, verify_all
from distill.shards.__main__ import main as shards_command
from distill.teacher import claims
from distill.teacher import precompute as precompute_module
from distill.teacher.precompute import PrecomputeStage

CPU = torch.device("cpu")


def config_of(folder, encoder, *overrides):
    folder.mkdir(exist_ok=True)
    return load_config(write_config(folder, encoder), list(overrides))


def precompute(config):
    return stage_of(config, "precompute").run(CPU)


def digests(config):
    shards = config.run_dir / "shards"
    return {str(p.relative_to(shards)): hashlib.sha256(p.read_bytes()).hexdigest() for p in shards.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_encoder):
    config = config_of(tmp_path_factory.mktemp("whole"), tiny_encoder)
    assert precompute(config)
    return config


def _task(path, overrides):
    torch.set_num_threads(1)
    precompute(load_config(path, overrides))


def run_tasks(path, count, *overrides):
    """`count` tasks side by side, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=_task, args=(path, overrides)) for _ in range(count)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(120)
    assert [task.exitcode for task in tasks] == [0] * count


def test_shards_do_not_depend_on_the_number_of_tasks(whole, tmp_path, tiny_encoder):
    path = write_config(tmp_path, tiny_encoder)
    run_tasks(path, 2)
    config = load_config(path)
    assert digests(config) == digests(whole)
    assert stage_of(config, "precompute").reason_to_run() is None
    tasks = [json.loads(line) for line in (config.run_dir / "precompute/tasks.jsonl").read_text().splitlines()]
    assert sum(task["texts"] for task in tasks) == 600  # nothing was made twice


def test_what_a_killed_task_left_missing_is_made_by_a_later_one(whole, tmp_path, tiny_encoder, monkeypatch):
    config = config_of(tmp_path, tiny_encoder)
    shutil.copytree(whole.run_dir, config.run_dir)
    for name in ("manifest.json", "000001.tar"):
        (config.run_dir / "shards" / name).unlink()
    shutil.rmtree(config.run_dir / "precompute")
    (config.run_dir / "shards/.000001.claim").write_text("{}")  # its claim; from where, nobody can tell
    monkeypatch.setattr(claims, "TIMEOUT", 1.0)
    assert precompute(config)
    assert digests(config) == digests(whole)


def _prepare(path, results):
    results.put(stage_of(load_config(path), "precompute").prepare()["fingerprint"])


def test_tasks_that_start_together_cut_the_text_once(tmp_path, tiny_encoder):
    path = write_config(tmp_path, tiny_encoder)
    (tmp_path / "text.txt").write_text("\n".join(sentences(20_000)) + "\n")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    tasks = [context.Process(target=_prepare, args=(path, results)) for _ in range(4)]
    for task in tasks:
        task.start()
    found = {results.get(timeout=hang_limit()) for _ in tasks}
    for task in tasks:
        task.join()
    assert len(found) == 1 and all(task.exitcode == 0 for task in tasks)
    text = tmp_path / "runs/tiny/precompute/text"
    assert not list(text.parent.glob("*.part"))


def test_held_out_texts_are_those_whose_hash_is_0_modulo_50_and_no_training_text_is(whole):
    training, held_out = ShardReader(whole.run_dir / "shards"), ShardReader(whole.run_dir / "shards/held_out")
    for reader, expected in ((training, False), (held_out, True)):
        rows = np.arange(len(reader))
        residues = [(text_hash(text) % 2**64) % HELD_OUT_MODULUS for text in reader.texts(rows)]
        assert all((residue == 0) is expected for residue in residues) and residues
        assert reader.hashes(rows).tolist() == [text_hash(text) for text in reader.texts(rows)]
    assert len(training) + len(held_out) == 600


def test_every_byte_is_as_it_was_written(whole):
    assert verify_all(whole.run_dir / "shards") == [] == verify_all(whole.run_dir / "shards/held_out")


def test_precomputed_vectors_stay_with_their_texts_although_rows_were_dropped(tmp_path, tiny_encoder):
    kept = sentences(300)
    raw = [line for text in kept for line in (text, "short", text.upper().lower(), "x" * 2000)]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(raw), 12)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "text.txt").write_text("\n".join(raw) + "\n")
    teacher = f"teacher={{vectors: {tmp_path / 'v.npy'}}}"
    limits = ("text.min_chars=12", "text.max_chars=1000")
    config = config_of(tmp_path, tiny_encoder, teacher, f"student.init={tiny_encoder}", "shards.rows=100", *limits)
    assert precompute(config)
    row_of = {text: row for row, text in reversed(list(enumerate(raw)))}
    found = 0
    for reader in (ShardReader(config.run_dir / "shards"), ShardReader(config.run_dir / "shards/held_out")):
        for index in range(len(reader)):
            text, vector = reader[index]
            given = vectors[row_of[text]]
            assert np.allclose(vector, given / np.linalg.norm(given), atol=1e-3)
            found += 1
    assert found == len(kept)


def test_a_changed_text_chunk_is_found_and_named(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    stage_of(config, "precompute").prepare()
    chunk = config.run_dir / "precompute/text/000001.txt"
    chunk.write_bytes(chunk.read_bytes().replace(b"model", b"nodel", 1))
    with pytest.raises(ValueError, match=r"000001\.txt is not as it was written"):
        precompute(config)


def test_shards_of_two_teachers_are_never_mixed(tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    config = config_of(tmp_path, encoder)
    precompute(config)
    (config.run_dir / "shards/000001.tar").unlink()
    (config.run_dir / "shards/manifest.json").unlink()
    shutil.copy(make_encoder(tmp_path / "other", seed=1) / "model.safetensors", encoder)
    with pytest.raises(ValueError, match=r"begun with another text or teacher \(input .*/encoder: "):
        precompute(config)
    with pytest.raises(ValueError, match="the teacher's files have changed"):
        stage_of(config, "precompute").identify(None)
    (config.run_dir / "precompute/BEGUN.json").unlink()
    with pytest.raises(ValueError, match=r"0000\d\d\.tar: foreign, made by teacher"):
        precompute(config)
    assert not (config.run_dir / "shards/manifest.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x00\xff", None])
def test_a_damaged_record_of_the_begun_stage_costs_neither_text_nor_shards(tmp_path, tiny_encoder, whole, monkeypatch, content):
    config = config_of(tmp_path, tiny_encoder)
    stage_of(config, "precompute").prepare()
    begun = config.run_dir / "precompute/BEGUN.json"
    begun.write_bytes(begun.read_bytes()[:-3] + b"x}\n" if content is None else content)
    with monkeypatch.context() as patch:
        patch.setattr(precompute_module, "prepare_text", None)
        assert stage_of(config, "precompute").prepare()["fingerprint"]
    assert begun.with_name("BEGUN.json.damaged").exists() and precompute(config)
    tars = [(folder.run_dir / "shards/000001.tar").read_bytes() for folder in (config, whole)]
    assert tars[0] == tars[1]


def test_text_of_other_settings_is_not_kept_without_a_record(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    before = stage_of(config, "precompute").prepare()
    (config.run_dir / "precompute/BEGUN.json").unlink()
    assert stage_of(config_of(tmp_path, tiny_encoder, "text.min_chars=30"), "precompute").prepare() != before


def test_the_same_run_again_embeds_nothing(whole, tmp_path, tiny_encoder):
    before = {path: path.stat().st_mtime_ns for path in (whole.run_dir / "shards").rglob("*.tar")}
    assert precompute(whole)
    assert {path: path.stat().st_mtime_ns for path in (whole.run_dir / "shards").rglob("*.tar")} == before


def test_changed_row_numbers_of_precomputed_vectors_are_found_and_named(tmp_path, tiny_encoder):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(600, 12)))
    teacher = f"teacher={{vectors: {tmp_path / 'v.npy'}}}"
    config = config_of(tmp_path, tiny_encoder, teacher, f"student.init={tiny_encoder}")
    stage_of(config, "precompute").prepare()
    path = config.run_dir / "precompute/text/000001.rows.npy"
    np.save(path, np.load(path)[::-1])
    with pytest.raises(ValueError, match=r"000001\.rows\.npy is not as it was written"):
        precompute(config)


def dev_score(config):
    return json.loads((config.run_dir / "precompute/teacher_dev.json").read_text())


def test_a_dev_score_that_a_killed_task_did_not_compute_is_computed_at_the_next_start(tmp_path, tiny_encoder, monkeypatch):
    sts = write_pairs(tmp_path / "sts", "stsb_dev")
    config = config_of(tmp_path, tiny_encoder, f"evaluate.sts={sts}")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(precompute_module, "write_dev_score", killed)
        with pytest.raises(KeyboardInterrupt):
            precompute(config)
    assert not stage_of(config, "precompute").shards_dir.joinpath("manifest.json").exists()
    assert precompute(config)
    assert dev_score(config)["sts"] == str(sts)


def test_a_dev_score_that_is_asked_for_later_is_added_to_a_finished_precompute(whole, tmp_path, tiny_encoder):
    shutil.copytree(whole.run_dir, tmp_path / "runs/tiny")
    path, sts = write_config(tmp_path, tiny_encoder), write_pairs(tmp_path / "sts", "stsb_dev")
    path.write_text(path.read_text().replace(str(tmp_path / "text.txt"), str(whole.run_dir.parents[1] / "text.txt")))
    config = load_config(path, [f"evaluate.sts={sts}"])
    done = (config.run_dir / "precompute/DONE.json").read_bytes()
    assert call("precompute.py", "--config", path, f"evaluate.sts={sts}").returncode == 0
    assert dev_score(config)["sts"] == str(sts)
    assert (config.run_dir / "precompute/DONE.json").read_bytes() == done and digests(config) == digests(whole)
    again = call("precompute.py", "--config", path, f"evaluate.sts={sts}")
    assert again.returncode == 0 and "done already" in again.stdout


def test_a_held_out_set_that_repair_took_apart_is_made_again(whole, tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    assert precompute(config)
    (config.run_dir / "shards/held_out/000000.tar").unlink()
    shards_command(["repair", str(config.run_dir / "shards")])
    assert "held_out/manifest.json is missing" in stage_of(config, "precompute").reason_to_run()
    assert precompute(config)
    assert digests(config) == digests(whole) and stage_of(config, "precompute").reason_to_run() is None


def test_a_hub_teacher_whose_commit_is_known_only_after_the_start_is_continued(tmp_path, tiny_encoder, monkeypatch):
    folder = tmp_path / "hub" / "models--owner--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    config = config_of(tmp_path, tiny_encoder, "teacher.model=owner/tiny", f"student.init={tiny_encoder}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    stage = stage_of(config, "precompute")
    stage.prepare()
    shutil.copytree(tiny_encoder, folder / "snapshots" / commit)
    (folder / "refs/main").write_text(commit)
    begun = json.loads((config.run_dir / "precompute/BEGUN.json").read_text())
    assert "owner/tiny" not in begun["inputs"] and stage.changes_since(begun) == []
    assert stage.identify(None)["files"] == {"commit": commit}


def truncate(shards):
    os.truncate(shards / "000001.tar", 20_000)


def flip(shards):
    data = bytearray((shards / "000001.tar").read_bytes())
    data[9000] ^= 4
    (shards / "000001.tar").write_bytes(data)


def rename(shards):
    (shards / "000001.tar").rename(shards / "000007.tar")


def swap(shards):
    shutil.copy(shards / "000000.tar", shards / "000001.tar")


def lose(shards):
    (shards / "000001.tar").unlink()


def disagree(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["count"] += 1
    (shards / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("harm", [truncate, flip, rename, swap, lose, disagree])
def test_damage_is_named_by_verify_and_fixed_by_repair_and_the_same_command(whole, tmp_path, tiny_encoder, capsys, harm):
    config = config_of(tmp_path, tiny_encoder)
    shutil.copytree(whole.run_dir / "shards", config.run_dir / "shards")
    assert precompute(config)
    shards = config.run_dir / "shards"
    made = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    harm(shards)
    assert shards_command(["verify", str(shards)]) == 1
    assert re.search(r"manifest\.json" if harm is disagree else r"000001\.tar: ", capsys.readouterr().out)
    shards_command(["repair", str(shards)])
    reason = stage_of(config, "precompute").reason_to_run()
    assert reason is None if harm is disagree else "manifest.json is missing" in reason
    assert precompute(config)
    assert shards_command(["verify", str(shards)]) == 0
    assert {name: value for name, value in digests(config).items() if not name.endswith(".unlisted")} == digests(whole)
    remade = {path.name for path in shards.glob("*.tar") if path.stat().st_mtime_ns != made.get(path.name)}
    assert remade <= {"000001.tar"}, "more was made again than what was bad"
    assert stage_of(config, "precompute").reason_to_run() is None


def test_a_second_config_is_refused_while_tasks_of_the_first_work_and_have_no_shard_yet(tmp_path, tiny_encoder):
    first, second = (stage_of(config_of(tmp_path, tiny_encoder, f"text.min_chars={size}"), "precompute") for size in (12, 13))
    first.prepare()
    with pytest.raises(ValueError, match=r"tasks of another config are at work \(text.min_chars: 12 -> 13\)"):
        second.prepare()
    del first  # the task has ended
    second.prepare()


def test_tasks_that_finish_together_do_so_one_after_the_other(tmp_path, tiny_encoder):
    config = config_of(tmp_path, tiny_encoder)
    assert precompute(config)
    shutil.copytree(config.run_dir / "precompute", config.run_dir / ".precompute.previous")
    (config.run_dir / "precompute/DONE.json").unlink()
    stages, running, overlaps = [stage_of(config, "precompute") for _ in range(2)], [], []

    def finish_set(*arguments):
        overlaps.append(len(running))
        running.append(1)
        time.sleep(0.2)
        PrecomputeStage.finish_set(stages[0], *arguments)
        running.pop()
        return True

    text = stages[0].prepare()
    identity = stages[0].identify(None)
    for stage in stages:
        stage.finish_set = finish_set
    with ThreadPoolExecutor(2) as tasks:
        assert list(tasks.map(lambda stage: stage._finish(text, identity, Timing()), stages)) == [True, True]
    assert overlaps == [0] and not (config.run_dir / ".precompute.previous").exists()


def test_texts_that_reach_the_longest_input_are_counted_in_the_log(tmp_path, tiny_encoder, caplog):
    caplog.set_level(logging.INFO, "distill")
    config = config_of(tmp_path, tiny_encoder, "teacher.max_length=8")
    precompute(config)
    reader, held_out = ShardReader(config.run_dir / "shards"), ShardReader(config.run_dir / "shards/held_out")
    texts = [*reader.texts(range(len(reader))), *held_out.texts(range(len(held_out)))]
    at_limit = sum(len(text.split()) + 3 >= 8 for text in texts)  # [CLS], ., [SEP]
    assert f"precompute: {at_limit} of {len(texts)} texts reach the longest input; longer ones are truncated" in caplog.text
