"""Parallel text: the teacher embeds one column, the student learns all of them towards its vectors, in equal shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences, write_config
from distributed_ranks import on_ranks
from engines import CPU, embed_text, train_stage
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import load_config, stage_of
from distill.corpus import text_hash
from distill.corpus.text_config import TextConfig
from distill.evaluation.measure import Measurement, Model
from distill.evaluation.tasks import read_tasks
from distill.metrics.fidelity import fidelity
from distill.run.sampling import GlobalOrder
from distill.shards import ShardReader, verify_all
from distill.shards.format import HELD_OUT
from distill.student import Student
from distill.training.batches import ShardBatches
from distill.training.mixture import mixture_of
from distill.training.samples import Samples

ENGLISH = sentences(300, seed=5)
GERMAN = [" ".join(reversed(text.rstrip(".").split())) if row % 4 else "" for row, text in enumerate(ENGLISH)]
FRENCH = [text.upper() if row % 10 == 0 else "" for row, text in enumerate(ENGLISH)]
NAMES = ["a.txt", "rows.tsv en", "rows.tsv de", "rows.tsv fr"]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tiny_encoder) -> Path:
    """The config of a run whose precompute is done: 200 texts of one language, then 300 with translations."""
    folder = tmp_path_factory.mktemp("parallel")
    config = write_config(folder, tiny_encoder)
    (folder / "a.txt").write_text("\n".join(sentences(200)) + "\n")
    rows = [("en", "de", "fr"), *zip(ENGLISH, GERMAN, FRENCH, strict=True)]
    (folder / "rows.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    parallel = f"{{type: parallel, path: {folder / 'rows.tsv'}, columns: [en, de, fr]}}"
    text = config.read_text(encoding="utf-8").replace(f"{folder / 'text.txt'}}}", f"{folder / 'a.txt'}}}, {parallel}")
    config.write_text(text)
    return embed_text(config)


@pytest.fixture
def reader(embedded) -> ShardReader:
    return ShardReader(load_config(embedded).shards_dir)


def test_the_teacher_embeds_its_column_alone_and_each_vector_is_stored_once(embedded, reader, tiny_encoder):
    config = load_config(embedded)
    assert verify_all(config.shards_dir) == verify_all(config.shards_dir / "held_out") == []
    translations = {text_hash(en): (en, de, fr) for en, de, fr in zip(ENGLISH, GERMAN, FRENCH, strict=True)}
    for folder in (config.shards_dir, config.shards_dir / "held_out"):
        found = ShardReader(folder)
        rows = np.arange(len(found))
        texts = [found.texts(rows, np.full(len(rows), column)) for column in range(found.num_columns)]
        expected = [translations.get(text_hash(text), (text, "", "")) for text in texts[0]]
        assert list(zip(*texts, strict=True)) == expected
        teacher = SentenceTransformer(str(tiny_encoder), device="cpu")
        assert np.abs(found.vectors(rows) - teacher.encode(texts[0], normalize_embeddings=True)).max() < 1e-3
    assert [source.columns for source in reader.manifest.sources] == [[], ["en", "de", "fr"]]


def counts_of(reader: ShardReader) -> list[int]:
    """The texts of each source and column, counted one by one."""
    rows = np.arange(len(reader))
    numbers = reader.sources(rows)
    columns = [reader.texts(rows, np.full(len(rows), column)) for column in range(3)]
    of_columns = [sum(bool(text) for text, number in zip(texts, numbers, strict=True) if number == 1) for texts in columns]
    return [int((numbers == 0).sum()), *of_columns]


def test_the_columns_of_a_source_have_equal_shares(embedded, reader):
    text = load_config(embedded).text
    sources, counts = mixture_of(reader, text), counts_of(reader)
    assert [source.name for source in sources] == NAMES and [source.num_rows for source in sources] == counts
    assert sum(counts) == reader.num_samples
    shares = np.array([source.weight for source in sources])
    assert shares == pytest.approx(np.array([counts[0], *[sum(counts[1:]) / 3] * 3]) / sum(counts))
    weighted = TextConfig(
        sources=[source.model_copy(update={"weight": 1 + number}) for number, source in enumerate(text.sources)]
    )
    assert [source.weight for source in mixture_of(reader, weighted)] == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])


def test_an_epoch_has_as_many_samples_as_there_are_texts_of_all_columns_and_none_is_empty(embedded, reader):
    order = GlobalOrder(reader.shard_rows, global_batch=32, seed=0, sources=mixture_of(reader, load_config(embedded).text))
    samples = Samples(reader)
    assert samples.source_names == NAMES and order.steps_per_epoch == reader.num_samples // 32
    seen = []
    for epoch in (-1, 0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        drawn = np.concatenate([order.batch(step) for step in steps])
        assert np.bincount(samples.sources(drawn)).tolist() == order.quotas
        assert max(order.quotas[1:]) - min(order.quotas[1:]) <= 1 and order.quotas[0] <= counts_of(reader)[0]
        assert all(samples.texts(drawn))
        seen.append(drawn)
    counts = np.bincount(np.concatenate(seen[1:]))
    for number, (size, quota) in enumerate(zip(counts_of(reader), order.quotas, strict=True)):
        of_source = np.unique(np.concatenate(seen[1:]))
        of_source = of_source[samples.sources(of_source).numpy() == number]
        assert np.abs(counts[of_source] - 2 * quota / size).max() < 1, number


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_columns_of_a_row_have_its_hash_and_its_vector_at_any_world_size(embedded, world_size):
    config = load_config(embedded)
    setup = stage_of(config, "ckd").setup(CPU, None)
    reader, order = setup.reader, GlobalOrder(setup.reader.shard_rows, global_batch=250, seed=0, sources=setup.mixture)
    part = {"micro_batch": 40, "world_size": world_size}
    micro = [each for rank in range(world_size) for each in ShardBatches(reader, order, setup.student, rank=rank, **part)(1)]
    samples, batches = Samples(reader), ShardBatches(reader, order, setup.student, rank=0, micro_batch=40, world_size=1)
    drawn = batches.rows(1)
    assert sorted(drawn) == sorted(order.batch(1)) and np.all(np.diff(samples.lengths(drawn)) <= 0)
    rows, columns = samples.rows(drawn), samples.columns(drawn)
    assert len(set(rows.tolist())) < len(set(drawn.tolist())), "a row is there in several columns"
    assert set(columns.tolist()) == {0, 1, 2}
    found = {name: torch.cat([getattr(each, name) for each in micro]) for name in ("positions", "hashes", "teacher", "sources")}
    order_of = found["positions"].argsort()
    assert np.array_equal(found["hashes"][order_of], reader.hashes(rows))
    assert np.array_equal(found["teacher"][order_of], reader.vectors(rows))
    assert torch.equal(found["sources"][order_of], samples.sources(drawn))
    num_tokens = sum(int(chunk["attention_mask"].sum()) for each in micro for chunk in each.tokens)
    assert num_tokens == sum(map(len, setup.student.token_ids(samples.texts(drawn))))


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard/ckd"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def train(config: Path, runs_dir: Path, name: str, stop_at: int | None = None) -> Path:
    changes = [f"runs_dir={runs_dir}", f"name={name}", f"shards_from={load_config(config).run_dir}", "ckd.max_steps=16"]
    changes += ["ckd.weights={ckd: 1, cosine: 10}", "ckd.dev_every=16", "ckd.prefill=true", "ckd.lr=3e-3"]
    if stop_at is not None:
        stopped = on_ranks(2, train_stage, config, "ckd", changes, lambda step: step == stop_at)
        assert stopped == [f"ckd: stopped on request at step {stop_at} of 16"] * 2
    on_ranks(2, train_stage, config, "ckd", changes)
    return runs_dir / name


def test_a_student_learns_all_columns_on_two_ranks(embedded, reader, tmp_path):
    run = train(embedded, tmp_path, "two")
    check_fidelity_of_translations(run, load_config(embedded).shards_dir)
    found = scalars(run)
    order = GlobalOrder(reader.shard_rows, global_batch=32, seed=0, sources=mixture_of(reader, load_config(embedded).text))
    numbers = [Samples(reader).sources(order.batch(step)) for step in range(16)]
    for number, name in enumerate(NAMES):
        assert [count for _, count in found[f"source_texts/{name}"]] == [int((drawn == number).sum()) for drawn in numbers]
        losses = [loss for _, loss in found[f"source_loss/{name}"]]
        assert np.mean(losses[-4:]) < np.mean(losses[:4]), name


class Encoder:
    """A student as a TextEncoder."""

    params, dtype = 1, "float32"

    def __init__(self, student: Student) -> None:
        self.student, self.dim = student, student.dim

    def __call__(self, texts, role=None):
        return self.student.encode(list(texts))


def check_fidelity_of_translations(run: Path, shards: Path) -> None:
    """The dev evaluation's and the final one's are those of the translations' vectors and of the stored ones of their texts."""
    found, student, held_out = scalars(run), Student.load(run / "ckd/student").eval(), ShardReader(shards / HELD_OUT)
    measurement, rows = Measurement(read_tasks(), shards, len(held_out), 0), np.arange(len(held_out))
    results = measurement.measure(Model("ckd", "id", lambda: Encoder(student)))["ckd"].fidelity_of_translations
    assert results.keys() == {"de"}, "of fr, fewer than 3 are held out"
    texts = held_out.texts(rows, np.ones(len(rows), np.int64))
    present = [row for row, text in enumerate(texts) if text]
    expected = fidelity(student.encode([texts[row] for row in present]), held_out.vectors(present).astype(np.float32))
    assert results["de"].texts == len(present) and results["de"].spearman == pytest.approx(expected["spearman"], abs=1e-6)
    assert {f"dev/fidelity_de/{metric}" for metric in expected} <= found.keys()


@pytest.mark.slow
def test_a_stopped_stage_gives_the_same_student(embedded, tmp_path):
    runs = [train(embedded, tmp_path, "straight"), train(embedded, tmp_path, "stopped", stop_at=11)]
    students = [load_file(run / "ckd/student/model.safetensors") for run in runs]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    tags = [tag for tag in scalars(runs[0]) if tag.startswith("source_")]
    assert len(tags) == 8 and all(scalars(runs[0])[tag] == scalars(runs[1])[tag] for tag in tags)


def test_simcse_takes_all_columns_and_those_of_a_row_are_no_negatives(embedded):
    stage = stage_of(load_config(embedded, ["simcse.global_batch=250", "simcse.micro_batch=250"]), "simcse")
    task = stage.build(stage.setup(CPU, None))
    (micro,) = task.load(0)
    drawn = task.order.batch(0)
    samples = Samples(ShardReader(load_config(embedded).shards_dir))
    assert set(samples.columns(drawn).tolist()) == {0, 1, 2}
    assert sorted(micro.hashes[:, 0].tolist()) == sorted(samples.hashes(drawn).tolist())
    assert torch.equal(micro.hashes[:, 0], micro.hashes[:, 1]) and len(micro.hashes[:, 0].unique()) < len(drawn)


def test_a_frozen_encoder_is_refused_before_anything_is_loaded(embedded):
    stage = stage_of(load_config(embedded, ["hpd.init=student", "hpd.freeze_encoder=true"]), "hpd")
    with pytest.raises(ValueError, match=r"hpd.freeze_encoder keeps one vector per text .* set hpd.freeze_encoder=false"):
        stage.check_inputs()


def test_tokens_of_translations_are_kept_in_a_cut_vocabulary(embedded, tmp_path):
    run = load_config(embedded).run_dir
    changes = [f"runs_dir={tmp_path}", f"shards_from={run}", "student.vocabulary={from: text}"]
    stage = stage_of(load_config(embedded, changes), "ckd")
    stage.begin()
    student = stage.setup(CPU, None).student
    reader = ShardReader(run / "shards")
    samples = Samples(reader)
    texts = samples.texts(np.arange(len(samples)))
    full = stage_of(load_config(embedded), "ckd").setup(CPU, None).student
    assert student.tokenizer.batch_decode(student.token_ids(texts)) == full.tokenizer.batch_decode(full.token_ids(texts))
    assert len(student.tokenizer) < len(full.tokenizer)
