"""Weighted sources: the share of each in training, its repetition on the console, its loss in TensorBoard; nothing is embedded
again for other weights."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences, write_config
from distributed_ranks import on_ranks
from engines import CPU, embed_text, train_stage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import load_config, stage_of
from distill.corpus.text_config import TextConfig
from distill.run.config import ConfigError
from distill.run.sampling import GlobalOrder
from distill.shards import Manifest, ShardError, ShardReader, finish, write_shard
from distill.training.batches import ShardBatches
from distill.training.mixture import check_mixture, mixture_of


def with_weights(config: Path, *weights: float | None) -> Path:
    """A copy of a config of the sources a.txt and b.txt with these weights."""
    text = config.read_text(encoding="utf-8")
    for name, weight in zip(("a", "b"), weights, strict=True):
        text = text.replace(f"{name}.txt}}", f"{name}.txt, weight: {weight}}}") if weight else text
    copy = config.with_name(f"weights{weights}.yaml")
    copy.write_text(text)
    return copy


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tiny_encoder) -> Path:
    """The config of a run whose precompute is done: 500 texts of one source, then 100 of another, without weights."""
    folder = tmp_path_factory.mktemp("mixture")
    config, texts = write_config(folder, tiny_encoder), sentences(600)
    for name, rows in (("a", texts[:500]), ("b", texts[500:])):
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    files = ", ".join(f"{{type: file, path: {folder / name}.txt}}" for name in ("a", "b"))
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(f"{{type: file, path: {folder / 'text.txt'}}}", files))
    return embed_text(config)


def test_every_source_has_a_weight_or_none():
    sources = [{"type": "file", "path": "a.txt", "weight": 0.5}, {"type": "file", "path": "b.txt"}]
    with pytest.raises(ValueError, match=r"sources\[1\] has no weight, and others have: give every source a weight, or none"):
        TextConfig(sources=sources)
    with pytest.raises(ValueError, match="greater than 0"):
        TextConfig(sources=[{"type": "file", "path": "a.txt", "weight": 0}])
    assert TextConfig(sources=sources[:1]).weights == [], "one source needs no weight"
    assert TextConfig(sources=[sources[0], sources[0] | {"weight": 2}]).weights == [0.5, 2.0]


def test_other_weights_make_nothing_again_but_the_training_stages(embedded):
    plain, weighted = load_config(embedded), load_config(with_weights(embedded, 1.0, 3.0))
    for config in (plain, weighted):
        precompute = stage_of(config, "precompute")
        assert precompute.reason_to_run() is None and precompute.progress() != []
        assert "weight" not in str(precompute.settings("result")["text"])
    for name in ("ckd", "hpd", "finetune", "simcse"):
        before, now = (stage_of(config, name).settings("result") for config in (plain, weighted))
        assert now == before | {"text": {"sources": [{"weight": 1.0}, {"weight": 3.0}]}} and "text" not in before
    assert load_config(weighted.run_dir / "config.yaml").text == plain.text


def test_weights_are_kept_in_the_config_that_a_run_writes(embedded, tmp_path):
    config = load_config(with_weights(embedded, 1.0, 3.0), [f"runs_dir={tmp_path}"])
    stage = stage_of(config, "precompute")
    stage.begin()
    assert load_config(tmp_path / "tiny/config.yaml").text.weights == [1.0, 3.0]


def test_an_unfinished_stage_of_other_weights_is_refused(embedded, tmp_path):
    changes = [f"runs_dir={tmp_path}", f"shards_from={load_config(embedded).run_dir}"]
    stage = stage_of(load_config(with_weights(embedded, 1.0, 3.0), changes), "ckd")
    stage.begin()
    checkpoint = stage.directory / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").touch()
    assert stage.refusal() is None
    other = stage_of(load_config(with_weights(embedded, 1.0, 2.0), changes), "ckd")
    assert "of another config (text.sources[1].weight: 3.0 -> 2.0)" in str(other.refusal())
    assert "text: " in str(stage_of(load_config(embedded, changes), "ckd").refusal())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_rows_of_a_step_are_the_same_at_any_world_size(embedded, world_size):
    config = load_config(with_weights(embedded, 1.0, 3.0))
    setup = stage_of(config, "ckd").setup(CPU, None)
    reader, order = setup.reader, GlobalOrder(setup.reader.shard_rows, global_batch=33, seed=0, sources=setup.mixture)
    part = {"micro_batch": 8, "world_size": world_size}
    ranks = [ShardBatches(reader, order, setup.student, rank=rank, **part) for rank in range(world_size)]
    for step in (-1, 0, 20):
        micro = [part for batches in ranks for part in batches(step)]
        names = ("positions", "hashes", "sources")
        positions, hashes, sources = (torch.cat([getattr(each, name) for each in micro]) for name in names)
        rows = ranks[0].rows(step)
        assert sorted(rows.tolist()) == sorted(order.batch(step).tolist())
        assert np.array_equal(hashes[positions.argsort()], reader.hashes(rows))
        assert np.array_equal(sources[positions.argsort()], reader.sources(rows))


def scalars(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard" / stage), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def train(config: Path, runs_dir: Path, name: str, size: int, stop_at: int | None = None) -> dict[str, list[tuple[int, float]]]:
    """Trains ckd for five steps on this number of ranks, stopped once; its scalars."""
    changes = [f"runs_dir={runs_dir}", f"name={name}", f"shards_from={load_config(config).run_dir}", "ckd.max_steps=5"]
    if stop_at is not None:
        stopped = on_ranks(size, train_stage, config, "ckd", changes, lambda step: step == stop_at)
        assert stopped == [f"ckd: stopped on request at step {stop_at} of 5"] * size
    on_ranks(size, train_stage, config, "ckd", [*changes, "ckd.dev_every=5"])
    return scalars(runs_dir / name, "ckd")


def test_training_on_two_ranks_shows_the_share_and_the_loss_of_each_source(embedded, tmp_path):
    config = with_weights(embedded, 1.0, 3.0)
    found = train(config, tmp_path, "two", 2)
    loaded = load_config(config)
    reader = ShardReader(loaded.shards_dir)
    order = GlobalOrder(reader.shard_rows, global_batch=32, seed=0, sources=mixture_of(reader, loaded.text))
    for number, source in enumerate(("a.txt", "b.txt")):
        expected = [(step + 1, int((reader.sources(order.batch(step)) == number).sum())) for step in range(5)]
        assert found[f"source_texts/{source}"] == expected
    values = [
        [value for _, value in found[tag]] for tag in ("loss", "source_loss/a.txt", "source_loss/b.txt", "source_texts/a.txt")
    ]
    for loss, loss_a, loss_b, num_a in zip(*values, strict=True):
        assert loss == pytest.approx((loss_a * num_a + loss_b * (32 - num_a)) / 32, rel=1e-5) and loss_a != loss_b


@pytest.mark.slow
def test_the_losses_of_sources_are_those_of_one_rank_also_after_a_stop(embedded, tmp_path):
    config = with_weights(embedded, 1.0, 3.0)
    one, stopped = train(config, tmp_path, "one", 1), train(config, tmp_path, "stopped", 2, stop_at=3)
    for tag in ("loss", "source_loss/a.txt", "source_loss/b.txt", "source_texts/a.txt", "source_texts/b.txt"):
        assert [step for step, _ in stopped[tag]] == [1, 2, 3, 4, 5]
        assert [value for _, value in stopped[tag]] == pytest.approx([value for _, value in one[tag]], rel=1e-4)


def test_the_console_says_how_often_the_texts_of_each_source_are_seen(embedded, caplog):
    caplog.set_level(logging.INFO, "distill")
    config = load_config(with_weights(embedded, 1.0, 3.0))
    setup = stage_of(config, "ckd").setup(CPU, None)
    quotas = setup.shard_batches(config.ckd).order.quotas
    counts = np.bincount(setup.reader.sources(np.arange(len(setup.reader)))).tolist()
    for name, weight, count, quota in zip(("a.txt", "b.txt"), (1, 3), counts, quotas, strict=True):
        times = f"{quota / count:.2f}"
        assert f"source {name}: {count} texts, weight {weight}: each is seen {times} times an epoch" in caplog.text
    assert "left out" not in caplog.text


@pytest.mark.parametrize("micro_batch", [16, 5])
def test_the_losses_of_sources_in_simcse_add_up_to_the_loss(embedded, micro_batch):
    changes = ["simcse.global_batch=16", f"simcse.micro_batch={micro_batch}", "simcse.dropout=0.1"]
    stage = stage_of(load_config(embedded, changes), "simcse")
    task = stage.build(stage.setup(CPU, None))
    micro = task.load(0)
    context = task.prepare_step(0, micro, is_logged=True)
    loss = sum(task.module(part, context)[0].item() for part in micro)
    found = {name: rows.double().sum().item() for name, rows in context.observations().items()}
    assert found["source_loss/a.txt"] + found["source_loss/b.txt"] == pytest.approx(loss, rel=1e-5)
    sources = ShardReader(load_config(embedded).shards_dir).sources(task.order.batch(0))
    assert [found["source_texts/a.txt"], found["source_texts/b.txt"]] == np.bincount(sources).tolist()


@pytest.mark.parametrize("stage", ["ckd", "simcse", "finetune"])
def test_every_stage_takes_its_texts_from_the_mixture(embedded, stage):
    changes = ["finetune.init=student", "simcse.global_batch=16", "simcse.dropout=0.1", "student.layers=null"]
    stages = [stage_of(load_config(path, changes), stage) for path in (embedded, with_weights(embedded, 1.0, 3.0))]
    for each in stages:
        each.begin()
    tasks = [each.build(each.setup(CPU, None)) for each in stages]
    orders = [task.batches.order if stage == "ckd" else task.replay_order or task.order for task in tasks]
    assert [len(order.sources) for order in orders] == [0, 2]
    reader = ShardReader(load_config(embedded).shards_dir)
    rows = np.concatenate([orders[1].batch(step) for step in range(orders[1].steps_per_epoch)])
    assert np.bincount(reader.sources(rows)).tolist() == orders[1].quotas == [len(rows) // 4, len(rows) - len(rows) // 4]


def write_sources(folder: Path, sources: list[list[int]], names: tuple[str, ...] = ("a.txt", "b.txt")) -> ShardReader:
    """A set of a shard for each list of source numbers."""
    folder.mkdir()
    vectors = np.eye(4, dtype=np.float16)
    origin = {"teacher_fingerprint": "teacher", "block_rows": 4}
    for index, numbers in enumerate(sources):
        rows, texts = np.arange(len(numbers)), [f"{index} {row}" for row in range(len(numbers))]
        write_shard(folder, index, texts, rows, vectors[rows % 4], np.array(numbers, np.uint16), text_fingerprint="t", **origin)
    entries = [{"name": name, "role": None} for name in names]
    of_text = {"text_fingerprint": "text", "text_fingerprints": ["t"] * len(sources), "rows": 100, "sources": entries}
    finish(folder, teacher={}, **origin, **of_text)
    return ShardReader(folder)


TWO = TextConfig(sources=[{"type": "file", "path": f"{name}.txt", "weight": 1} for name in "ab"])


def test_sources_are_found_where_they_begin(tmp_path):
    reader = write_sources(tmp_path / "set", [[0, 0, 0], [0, 1, 1, 1, 1], [1, 1]])
    assert reader.source_starts.tolist() == [0, 4, 10]
    sources = mixture_of(reader, TWO)
    assert [source.shard_rows.tolist() for source in sources] == [[3, 1, 0], [0, 4, 2]]
    assert [[source.rows(shard).tolist() for shard in range(3)] for source in sources] == [
        [[0, 1, 2], [3], []],
        [[], [4, 5, 6, 7], [8, 9]],
    ]


def test_a_source_number_out_of_range_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"text 2 is of source 7, and the manifest has sources 0 to 1; run: python -m distill"):
        mixture_of(write_sources(tmp_path / "set", [[0, 1, 7]]), TWO)


def test_texts_in_another_order_than_their_sources_are_refused(tmp_path):
    (first, _) = mixture_of(write_sources(tmp_path / "set", [[0, 1, 0, 1, 1, 1, 1, 1]]), TWO)
    with pytest.raises(ShardError, match=r"shard 0 has texts in another order than that of their sources, .* leave text"):
        first.rows(0)


def test_a_source_without_a_training_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"text.sources\[1\].weight: source b.txt has no training text: leave the source out"):
        mixture_of(write_sources(tmp_path / "set", [[0, 0]]), TWO)


def test_shards_of_other_sources_or_without_source_numbers_are_refused(tmp_path, embedded):
    manifest = write_sources(tmp_path / "set", [[0, 1]], ("a.txt", "c.txt")).manifest
    with pytest.raises(ValueError, match=r"the shards are of the sources a.txt, c.txt, the config has a.txt, b.txt: name"):
        check_mixture(TWO, manifest)
    with pytest.raises(ValueError, match="made by an earlier version, which did not record the source of each text: leave"):
        check_mixture(TWO, manifest.model_copy(update={"sources": ()}))
    with pytest.raises(ConfigError, match=r"sources\[1\] has no weight"):
        load_config(with_weights(embedded, 1.0, None))
    config = load_config(with_weights(embedded, 1.0, 3.0))
    check_mixture(config.text, Manifest.load(config.shards_dir))
