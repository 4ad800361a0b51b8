"""Each value that TensorBoard shows against a slow, obvious count of the same."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from cells import write_set
from conftest import sentences
from distributed_ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import AutoTokenizer

from distill.objectives.ckd import ckd_loss
from distill.objectives.queue import KeyQueue
from distill.run.collectives import add_over_ranks, bytes_received, exchange, gather_rows
from distill.run.sampling import GlobalOrder
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import load_encoder
from distill.training.batches import MicroBatch, ShardBatches
from distill.training.keys import Keys
from distill.training.step_metrics import APART, StepClock, StepMetrics, forward_flops, num_passes, source_metrics
from distill.training.task import StepContext
from distill.training.tasks.ckd import CkdConfig
from distill.training.teacher_keys import TeacherKeysModule, TeacherKeysTask
from distill.training.tensorboard import TensorBoard
from distill.training.train_config import TemperatureConfig

CPU = torch.device("cpu")
ROWS, QUEUE, WIDTH = 24, 50, 16


@pytest.fixture
def student(tiny_encoder) -> Student:
    encoder = load_encoder(str(tiny_encoder))
    encoder.set_attn_implementation("eager")  # as in training on a CPU
    return Student(encoder, AutoTokenizer.from_pretrained(tiny_encoder), pooling="mean", max_length=32)


def new_module(student: Student, **options) -> TeacherKeysModule:
    config = CkdConfig(global_batch=ROWS, queue=QUEUE, **options)
    return TeacherKeysModule(student, nn.Linear(student.width, WIDTH), config, None)


def observed_step(module: TeacherKeysModule) -> tuple[MicroBatch, Keys, dict[str, torch.Tensor]]:
    """A global batch in which two rows are one text, with a queue; and what the module observes of its rows."""
    draw = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(ROWS + QUEUE, WIDTH, generator=draw), dim=1).half()
    hashes = torch.arange(ROWS + QUEUE)
    hashes[1] = hashes[ROWS + 3] = hashes[0]
    queue = KeyQueue(QUEUE, WIDTH)
    queue.push(vectors[ROWS:], hashes[ROWS:])
    tokens = module.student.tokenize(sentences(ROWS))
    micro = MicroBatch([tokens], torch.arange(ROWS), vectors[:ROWS], hashes[:ROWS], ROWS)
    context = StepContext(0, is_logged=True, keys=Keys(vectors[:ROWS], hashes[:ROWS], queue, sharded=False))
    module(micro, context)
    return micro, context.keys, context.observations()


def test_the_reference_loss_of_ckd_is_that_of_the_teachers_own_vectors(student):
    module = new_module(student, weights={"ckd": 1.0}, temperature=TemperatureConfig(scale=12.0))
    micro, keys, observed = observed_step(module)
    everything, ids = torch.cat([keys.vectors, keys.queue.keys]).float(), torch.cat([keys.hashes, keys.queue.ids])
    own = {"scale": torch.tensor([12.0]), "query_ids": micro.hashes, "key_ids": ids}
    expected = ckd_loss(micro.teacher.float(), everything, micro.positions, **own)
    assert float(observed["reference_loss/ckd"].mean()) == pytest.approx(float(expected), rel=1e-5)


def test_the_reference_loss_of_congen_is_the_entropy_of_the_labels_and_no_query_goes_below_it(student):
    module = new_module(student, weights={"congen": 1.0}, teacher_temperature=0.1, student_temperature=0.1)
    micro, keys, observed = observed_step(module)
    reference_b = observed["reference_loss/congen"]
    everything = torch.cat([keys.vectors, keys.queue.keys]).double()
    labels = torch.softmax(micro.teacher.double() @ everything.T / 0.1, dim=1)
    assert reference_b.tolist() == pytest.approx((-(labels * labels.log()).sum(dim=1)).tolist(), rel=1e-4)
    for seed in range(20):
        queries = micro.teacher.double() + torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * seed / 20
        logits = nn.functional.normalize(queries, dim=1) @ everything.T / 0.1
        losses = -(labels * torch.log_softmax(logits, dim=1)).sum(dim=1)
        assert bool((losses >= reference_b - 1e-3).all())


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    return ShardReader(write_set(tmp_path_factory.mktemp("set"), sentences(300), WIDTH))


@pytest.mark.parametrize("capacity, prefill", [(128, False), (50, False), (50, True), (33, True)])
def test_the_age_of_keys_is_what_counting_finds(reader, student, capacity, prefill):
    batch = 32
    config = CkdConfig(global_batch=batch, queue=capacity, prefill=prefill)
    order = GlobalOrder(reader.shard_rows, global_batch=batch, seed=0)
    batches = ShardBatches(reader, order, student, micro_batch=8, rank=0, world_size=1)
    task = TeacherKeysTask(TeacherKeysModule(student, nn.Linear(student.width, WIDTH), config, None), batches, CPU)
    pushed = [step for step in range(-(-capacity // batch) * -1 if prefill else 0, 0) for _ in range(batch)]
    for step in range(7):
        ages = [step - of for of in pushed[-capacity:]]
        metrics = task.step_metrics(step)
        assert metrics["queue/filled"] == len(ages) / capacity
        if ages:
            assert metrics["queue/age_max"] == max(ages)
            assert metrics["queue/age_mean"] == pytest.approx(sum(ages) / len(ages))
        pushed += [step] * batch


def test_the_flops_of_a_text_are_those_of_its_matrix_products(student):
    for mode in (False, True):
        student.train(mode)
        linear, square = forward_flops(student)
        assert all(module.training == mode for module in student.modules()), "dropout is on or off as it was"
    layers, width, inner = 3, 32, 64
    assert linear == pytest.approx(layers * 2 * (4 * width**2 + 2 * width * inner), rel=1e-6)
    assert square == pytest.approx(layers * 4 * width, rel=1e-6)
    assert num_passes(student.encoder) == 3 and num_passes(student.encoder.requires_grad_(False)) == 1


def received_by_a_rank(size: int) -> list[int]:
    counts = [bytes_received()]
    gather_rows(torch.zeros(6, 10, dtype=torch.float16), 6 * size)
    counts.append(bytes_received())
    exchange(torch.zeros(size, 5))
    counts.append(bytes_received())
    add_over_ranks(torch.zeros(8))
    counts.append(bytes_received())
    return np.diff(counts).tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_rank_receives_is_counted_as_the_design_counts_it(size):
    expected = [(size - 1) * 6 * 20, (size - 1) * 20, 2 * (size - 1) * 32 // size]
    assert on_ranks(size, received_by_a_rank, size) == [expected] * size


def test_fractions_of_the_time_add_up_and_throughput_is_without_evaluations(student):
    began = time.monotonic()
    metrics = StepMetrics(new_module(student), CPU)
    tokens = student.tokenize(["the model learns.", "a queue."])
    micro = MicroBatch([tokens], torch.arange(2), torch.zeros(2, 4), torch.arange(2), 2)
    for _ in range(4):
        metrics.count([micro])
        with metrics.clock.of("gather"):
            time.sleep(0.02)
    with metrics.clock.of("evaluation"):
        time.sleep(0.3)
    counted = {name: float(value) for name, value in metrics.sums().items()}
    lengths = tokens["attention_mask"].sum(dim=1)
    assert counted == {"tokens": 4 * int(lengths.sum()), "squares": 4 * int(lengths.square().sum())}
    values = metrics.since_last_call(**counted, global_batch=2)
    elapsed = time.monotonic() - began
    fractions = {name: value for name, value in values.items() if name.startswith("time/")}
    assert (
        sum(fractions.values()) == pytest.approx(1)
        and fractions["time/evaluation"] > fractions["time/gather"] >= 0.08 / elapsed
    )
    assert 8 / 0.08 > values["texts_per_second"] >= 8 / (elapsed - 0.3)
    assert values["tokens_per_second"] == pytest.approx(values["texts_per_second"] * float(lengths.sum()) / 2)
    assert 0 < values["mfu"] < 1
    assert metrics.since_last_call(0, 0, 2)["texts_per_second"] == 0, "counts begin again"
    assert set(APART) == {"evaluation", "checkpoint"}


def test_a_source_without_a_text_in_a_step_has_no_loss():
    context = StepContext(0, is_logged=True, source_names=["wiki", "news/2024", "mail"])
    context.observe_sources(torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 4.0]))
    context.observe_sources(torch.tensor([], dtype=torch.int64), torch.tensor([]))  # of an empty micro-batch
    means = {name: float(rows.double().sum()) / 4 for name, rows in context.observations().items()}  # of a global batch of 4
    metrics = source_metrics({"loss": 1.0} | means, 4)
    assert {name: metrics[f"source_texts/{name}"] for name in context.source_names} == {"wiki": 1, "news/2024": 0, "mail": 2}
    assert (
        metrics["source_loss/wiki"] == 1.0
        and metrics["source_loss/mail"] == 3.0
        and math.isnan(metrics["source_loss/news/2024"])
    )
    context.observe_sources(None, torch.ones(3))
    assert source_metrics({"loss": 1.0}, 4) == {}


def test_a_clock_gives_each_part_once():
    clock = StepClock(CPU)
    for _ in range(2):
        with clock.of("a"):
            time.sleep(0.01)
    whole, named = clock.take()
    assert whole >= named["a"] >= 0.02 and set(named) == {"a"}
    assert clock.take()[1] == {}


def test_histograms_have_the_same_bins_at_every_step_and_hold_every_value(tmp_path):
    tensorboard = TensorBoard(tmp_path, 1)
    draws = [np.random.default_rng(seed).uniform(-1, 1, 500) for seed in range(3)] + [np.array([1.0, -1.0, 0.0])]
    for step, draw in enumerate(draws, start=1):
        tensorboard.log_cosines(step, "cosines/positive", draw)
    tensorboard.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload().Histograms("cosines/positive")
    assert [event.step for event in events] == [1, 2, 3, 4]
    for event, draw in zip(events, draws, strict=True):
        kept = event.histogram_value
        assert sum(kept.bucket) == kept.num == len(draw) and kept.sum == pytest.approx(draw.sum())
        assert all(math.isclose(limit / 0.02, round(limit / 0.02), abs_tol=1e-9) for limit in kept.bucket_limit)
        below = np.array(kept.bucket_limit[:-1])[:, None] <= draw + 1e-12
        inside = below & (draw + 1e-12 < np.array(kept.bucket_limit[1:])[:, None])
        assert inside.sum(axis=1).tolist() == list(kept.bucket[1:])


def test_a_new_event_folder_replaces_the_old_one_and_a_resumed_one_purges_what_is_written_again(tmp_path):
    def points():
        return [(event.step, event.value) for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]

    for number, first in enumerate((1, 1, 3)):
        tensorboard = TensorBoard(tmp_path, first)
        assert tensorboard.is_new == (first == 1)
        if tensorboard.is_new:
            tensorboard.describe({"config": "as it was"}, [])
        for step in range(first, 5):
            tensorboard.log(step, {"loss": float(number)})
        assert tensorboard.has("loss", 4) and not tensorboard.has("loss", 5) and not tensorboard.has("other", 4)
        tensorboard.close()
    assert points() == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    texts = EventAccumulator(str(tmp_path)).Reload().Tensors("config/text_summary")
    assert [event.step for event in texts] == [0]
