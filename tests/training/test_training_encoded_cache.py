"""The cached vectors of a frozen encoder: those of its tokens, computed once, on any number of ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import write_set
from conftest import sentences
from distributed_ranks import on_ranks
from encoders import encoder_and_tokenizer
from engines import train_stage
from safetensors.torch import load_file

from distill.config import load_config, stage_of
from distill.run.collectives import any_rank, rank
from distill.run.sampling import GlobalOrder
from distill.run.session_log import read_sessions
from distill.run.stopping import Stopped
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.student.student_config import StudentConfig
from distill.training import encoded_cache
from distill.training.batches import ShardBatches
from distill.training.encoded_cache import Encoded, encode_all

NUM_ROWS, BLOCK = 200, 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), sentences(NUM_ROWS), 24)


def new_student(encoder_folder: Path) -> Student:
    encoder, tokenizer = encoder_and_tokenizer(StudentConfig(init=str(encoder_folder), layers=[0, 2]), None, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)
    set_dropout(student.encoder, 0.0)
    return student


def encode(shards: Path, encoder_folder: Path, directory: Path) -> np.ndarray:
    encoded_cache.BLOCK = BLOCK
    encoded = encode_all(new_student(encoder_folder), ShardReader(shards), directory, None)
    return np.stack(encoded.read(np.arange(NUM_ROWS)[::-1]))[::-1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_vectors_are_those_of_the_tokens_and_the_same_files_on_any_number_of_ranks(shards, tiny_encoder, tmp_path, num_ranks):
    texts = ShardReader(shards).texts(np.arange(NUM_ROWS))
    expected = new_student(tiny_encoder).encode(texts, normalize=False)
    for found in on_ranks(num_ranks, partial(encode, shards, tiny_encoder, tmp_path / "some")):
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    on_ranks(1, partial(encode, shards, tiny_encoder, tmp_path / "one"))
    some, one = (sorted((tmp_path / name).rglob("*.npy")) for name in ("some", "one"))
    assert [path.read_bytes() for path in some] == [path.read_bytes() for path in one]
    assert len(one) == -(-NUM_ROWS // BLOCK)


def test_what_a_killed_run_has_encoded_is_kept_but_not_used_for_another_encoder(shards, tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_cache, "BLOCK", BLOCK)
    student, reader = new_student(tiny_encoder), ShardReader(shards)
    encode_all(student, reader, tmp_path, None)
    lost, *kept = sorted(tmp_path.rglob("*.npy"))
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    encode_all(student, reader, tmp_path, None)
    assert lost.exists() and {path: path.stat().st_mtime_ns for path in kept} == before
    with torch.no_grad():
        next(student.encoder.parameters()).mul_(2)
    other = np.stack(encode_all(student, reader, tmp_path, None).read(np.arange(NUM_ROWS)))
    np.testing.assert_allclose(other, student.encode(reader.texts(np.arange(NUM_ROWS)), normalize=False), rtol=2e-3, atol=1e-3)


def test_a_damaged_block_is_named_and_made_again_and_one_without_a_record_too(
    shards, tiny_encoder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(encoded_cache, "BLOCK", BLOCK)
    student, reader = new_student(tiny_encoder), ShardReader(shards)
    encode_all(student, reader, tmp_path, None)
    damaged, unrecorded, *_ = paths = sorted(tmp_path.rglob("*.npy"))
    blocks = [path.read_bytes() for path in paths]
    damaged.write_bytes(blocks[0][:-1] + b"?")
    unrecorded.write_bytes(b"half")
    unrecorded.with_suffix(".json").unlink()
    encode_all(student, reader, tmp_path, None)
    assert [path.read_bytes() for path in paths] == blocks
    assert [path.name for path in tmp_path.rglob("*.damaged")] == ["000000.npy.damaged"]
    assert caplog.text.count("does not match its checksum") == 1 and str(damaged) in caplog.text


def test_a_step_has_the_same_rows_in_the_same_places_with_vectors_for_tokens(shards, tiny_encoder):
    student, reader = new_student(tiny_encoder), ShardReader(shards)
    vectors = student.encode(reader.texts(np.arange(NUM_ROWS)), normalize=False).astype(np.float16)
    student.add_head(8, "tanh", seed=0)
    blocks = [vectors[start : start + encoded_cache.BLOCK] for start in range(0, NUM_ROWS, encoded_cache.BLOCK)]
    encoded = Encoded(blocks.__getitem__)
    order = GlobalOrder(reader.shard_rows, global_batch=32, seed=0)
    part = {"micro_batch": 8, "rank": 1, "world_size": 2}
    outputs = []
    for source in (None, encoded):
        micro = ShardBatches(reader, order, student, **part, encoded=source)(2)
        positions = torch.cat([part.positions for part in micro])
        outputs.append((positions.sort().values, torch.cat([student(*part.tokens) for part in micro])[positions.argsort()]))
    assert torch.equal(outputs[0][0], outputs[1][0]) and len(outputs[0][0]) == 16
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=2e-3, atol=1e-3)


def test_a_rank_without_a_row_still_has_a_chunk():
    encoded = Encoded(lambda number: np.zeros((4, 6), dtype=np.float16))
    assert encoded.pad([]).vectors.shape == (1, 6)


def test_a_few_blocks_are_open_at_a_time_whatever_the_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_cache, "BLOCK", 2)
    monkeypatch.setattr(encoded_cache, "MAX_OPEN", 3)
    for number in range(12):
        np.save(tmp_path / f"{number}.npy", np.full((2, 4), number, np.float16))
    encoded = Encoded(lambda number: np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    found = np.stack(encoded.read(np.arange(24)[::-1]))
    assert found[:, 0].tolist() == [row // 2 for row in range(24)][::-1]
    mapped = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if str(tmp_path) in line
    }
    assert len(mapped) == 3


def encode_and_stop(shards: Path, encoder_folder: Path, directory: Path) -> int:
    """The number of checks until the ranks stop, which rank 1 alone is asked for after its first block."""
    encoded_cache.BLOCK = BLOCK
    num_checks = 0

    def check_stop() -> None:
        nonlocal num_checks
        num_checks += 1
        if any_rank(rank() == 1 and num_checks == 2):
            raise Stopped("stopped on request")

    with pytest.raises(Stopped):
        encode_all(new_student(encoder_folder), ShardReader(shards), directory, None, check_stop)
    return num_checks


def test_a_stop_on_one_rank_ends_the_encoding_of_all_after_a_block_and_what_is_encoded_is_kept(shards, tiny_encoder, tmp_path):
    assert on_ranks(2, partial(encode_and_stop, shards, tiny_encoder, tmp_path)) == [2, 2]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(kept) == 4
    on_ranks(1, partial(encode, shards, tiny_encoder, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(list(tmp_path.rglob("*.npy"))) > 4


@pytest.mark.slow
def test_a_head_on_a_frozen_encoder_is_the_same_after_a_stop_and_on_two_ranks(embedded_copy):
    config, run = embedded_copy
    steps = ("hpd.init=student", "hpd.freeze_encoder=true", "hpd.weights={relational: 1.0, pca: 1.0}", "hpd.whitening=0.25",
             "hpd.dim=8", "hpd.nested=[4]", "hpd.global_batch=16", "hpd.micro_batch=4", "hpd.max_steps=6", "hpd.epochs=9",
             "hpd.lr=1e-2", "hpd.dev_every=6", "engine.precision=fp32")  # fmt: skip
    students = []
    for name in ("whole", "stopped", "ranks"):
        directory = run.parent / name / "hpd"
        overrides = [f"name={name}", f"shards_from={run.name}", *steps]
        if name == "stopped":
            assert on_ranks(1, train_stage, config, "hpd", overrides, lambda step: step == 1) == [
                "hpd: stopped on request at step 1 of 6"
            ]
            assert list((directory / "cache").rglob("*.npy"))
        if name == "ranks":
            overrides.append("engine.deepspeed=configs/deepspeed/zero3.json")
        on_ranks(2 if name == "ranks" else 1, train_stage, config, "hpd", overrides)
        assert not (directory / "cache").exists()
        assert "encode" in [line["work"] for line in read_sessions(directory)]
        students.append(load_file(directory / "student/heads.safetensors"))
    stage = stage_of(load_config(config, list(steps)), "hpd")
    initial = stage.setup(torch.device("cpu"), None).student.encoder.state_dict()
    kept = load_file(directory / "student/model.safetensors")
    same = initial.keys() & kept.keys()
    assert len(same) > len(kept) / 2 and all(torch.equal(kept[name], initial[name]) for name in same)
    for other in students[1:]:
        for name, tensor in students[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    assert students[0].keys() >= {"head.0.weight"}
