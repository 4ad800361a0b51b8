"""What TensorBoard is told: each figure against a slow, obvious count of the same."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from distributed_ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import AutoTokenizer

from distill.config import CkdConfig
from distill.objectives.ckd import ckd_loss
from distill.objectives.queue import KeyQueue
from distill.student import Student
from distill.student.encoder import load_encoder
from distill.training.batches import MicroBatch
from distill.training.ckd import CkdRecipe
from distill.training.clock import Clock, forward_flops, passes
from distill.training.distributed import add_over_ranks, bytes_received, exchange, gather_dealt_rows
from distill.training.floors import contrast_floor, measured_floors
from distill.training.instruments import APART, Instruments
from distill.training.keys import Keys
from distill.training.metrics import Metrics
from distill.training.recipe import Task

CPU = torch.device("cpu")
ROWS, QUEUE, WIDTH = 24, 50, 16


def step_of_keys() -> tuple[MicroBatch, Keys]:
    """A global batch of which two rows are one text, and a queue."""
    draw = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(ROWS + QUEUE, WIDTH, generator=draw), dim=1).half()
    hashes = torch.arange(ROWS + QUEUE)
    hashes[1] = hashes[ROWS + 3] = hashes[0]
    queue = KeyQueue(QUEUE, WIDTH)
    queue.push(vectors[ROWS:], hashes[ROWS:])
    micro = MicroBatch([], torch.arange(ROWS), vectors[:ROWS], hashes[:ROWS], ROWS)
    return micro, Keys(vectors[:ROWS], hashes[:ROWS], queue, False, 0)


def student_of(folder) -> Student:
    encoder = load_encoder(str(folder))
    encoder.set_attn_implementation("eager")  # as on every processor
    return Student(encoder, AutoTokenizer.from_pretrained(folder), pooling="mean", max_length=32)


def test_the_floor_of_ckd_is_the_loss_of_the_teachers_own_vectors():
    micro, keys = step_of_keys()
    scale = torch.tensor([12.0])
    floors = measured_floors({"ckd"}, CkdConfig(), scale, micro, keys)
    everything, ids = torch.cat([keys.vectors, keys.queue.keys]).float(), torch.cat([keys.hashes, keys.queue.ids])
    own = {"scale": scale, "query_ids": micro.hashes, "key_ids": ids}
    expected = ckd_loss(micro.teacher.float(), everything, micro.positions, **own)
    assert float(floors["floor/ckd"].mean()) == pytest.approx(float(expected), rel=1e-5)


def test_the_floor_of_congen_is_the_entropy_of_the_labels_and_no_query_goes_below_it():
    micro, keys = step_of_keys()
    config = CkdConfig(weights={"congen": 1.0}, teacher_temperature=0.1, student_temperature=0.1)
    floor_b = measured_floors({"congen"}, config, torch.ones(1), micro, keys)["floor/congen"]
    everything = torch.cat([keys.vectors, keys.queue.keys]).double()
    labels = torch.softmax(micro.teacher.double() @ everything.T / 0.1, dim=1)
    assert floor_b.tolist() == pytest.approx((-(labels * labels.log()).sum(dim=1)).tolist(), rel=1e-4)
    for seed in range(20):
        queries = micro.teacher.double() + torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * seed / 20
        logits = nn.functional.normalize(queries, dim=1) @ everything.T / 0.1
        losses = -(labels * torch.log_softmax(logits, dim=1)).sum(dim=1)
        assert bool((losses >= floor_b - 1e-3).all())


def test_no_contrast_goes_below_its_floor():
    assert contrast_floor(20.0, 128) == pytest.approx(0, abs=1e-12)
    away = -torch.ones(1, 8)
    away[0, 0] = 1
    loss = nn.functional.cross_entropy(1.5 * away, torch.zeros(1, dtype=torch.long))
    assert contrast_floor(1.5, 8) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("capacity, prefill", [(128, False), (50, False), (50, True), (33, True)])
def test_the_age_of_keys_is_what_counting_finds(capacity, prefill):
    batch = 32
    recipe = CkdRecipe.__new__(CkdRecipe)
    recipe.queue = KeyQueue(capacity, 4)
    recipe.load = type("Load", (), {"order": type("Order", (), {"global_batch": batch})})
    recipe._first_step = -(-capacity // batch) * -1 if prefill else 0
    pushed = [step for step in range(recipe._first_step, 0) for _ in range(batch)]
    for step in range(7):
        ages = [step - of for of in pushed[-capacity:]]
        state = recipe.state(step)
        assert state["queue/filled"] == len(ages) / capacity
        if ages:
            assert state["queue/age_max"] == max(ages)
            assert state["queue/age_mean"] == pytest.approx(sum(ages) / len(ages))
        pushed += [step] * batch


def test_the_arithmetic_of_a_sentence_is_that_of_its_matrices(tiny_encoder):
    student = student_of(tiny_encoder)
    for mode in (False, True):
        student.train(mode)
        linear, square = forward_flops(student)
        assert all(module.training == mode for module in student.modules()), "dropout is on or off as it was"
    layers, width, inner = 3, 32, 64
    assert linear == pytest.approx(layers * 2 * (4 * width**2 + 2 * width * inner), rel=1e-6)
    assert square == pytest.approx(layers * 4 * width, rel=1e-6)
    assert passes(student.encoder) == 3 and passes(student.encoder.requires_grad_(False)) == 1


def received_by_a_rank(size: int) -> list[int]:
    counts = [bytes_received()]
    gather_dealt_rows(torch.zeros(6, 10, dtype=torch.float16), 6 * size)
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


def test_shares_of_the_time_add_up_and_evaluations_do_not_slow_the_speed(tiny_encoder):
    task = Task()
    task.student = student_of(tiny_encoder)
    began = time.monotonic()
    instruments = Instruments(task, CPU)
    tokens = task.student.tokenize(["the model learns.", "a queue."])
    micro = MicroBatch([tokens], torch.arange(2), torch.zeros(2, 4), torch.arange(2), 2)
    for _ in range(4):
        instruments.count([micro])
        with instruments.clock.of("gather"):
            time.sleep(0.02)
    with instruments.clock.of("evaluation"):
        time.sleep(0.3)
    counted = {name: float(value) for name, value in instruments.sums().items()}
    lengths = tokens["attention_mask"].sum(dim=1)
    assert counted == {"tokens": 4 * int(lengths.sum()), "squares": 4 * int(lengths.square().sum())}
    figures = instruments.figures(**counted, global_batch=2)
    elapsed = time.monotonic() - began
    shares = {name: value for name, value in figures.items() if name.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1) and shares["time/evaluation"] > shares["time/gather"] >= 0.08 / elapsed
    assert 8 / 0.08 > figures["sentences_a_second"] >= 8 / (elapsed - 0.3)
    assert figures["tokens_a_second"] == pytest.approx(figures["sentences_a_second"] * float(lengths.sum()) / 2)
    assert 0 < figures["mfu"] < 1
    assert instruments.figures(0, 0, 2)["sentences_a_second"] == 0, "counts begin again"
    assert set(APART) == {"evaluation", "checkpoint"}


def test_a_clock_gives_each_part_once():
    clock = Clock(CPU)
    for _ in range(2):
        with clock.of("a"):
            time.sleep(0.01)
    whole, named = clock.take()
    assert whole >= named["a"] >= 0.02 and set(named) == {"a"}
    assert clock.take()[1] == {}


def test_histograms_have_the_same_bins_at_every_step_and_hold_every_value(tmp_path):
    metrics = Metrics(tmp_path, 1)
    draws = [np.random.default_rng(seed).uniform(-1, 1, 500) for seed in range(3)] + [np.array([1.0, -1.0, 0.0])]
    for step, draw in enumerate(draws, start=1):
        metrics.log_cosines(step, "cosines/positive", draw)
    metrics.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload().Histograms("cosines/positive")
    assert [event.step for event in events] == [1, 2, 3, 4]
    for event, draw in zip(events, draws, strict=True):
        kept = event.histogram_value
        assert sum(kept.bucket) == kept.num == len(draw) and kept.sum == pytest.approx(draw.sum())
        assert all(math.isclose(limit / 0.02, round(limit / 0.02), abs_tol=1e-9) for limit in kept.bucket_limit)
        below = np.array(kept.bucket_limit[:-1])[:, None] <= draw + 1e-12
        inside = below & (draw + 1e-12 < np.array(kept.bucket_limit[1:])[:, None])
        assert inside.sum(axis=1).tolist() == list(kept.bucket[1:])


def test_a_new_record_forgets_the_old_one_and_a_resumed_one_only_what_comes_again(tmp_path):
    def points():
        return [(event.step, event.value) for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]

    for number, first in enumerate((1, 1, 3)):
        metrics = Metrics(tmp_path, first)
        assert metrics.is_new == (first == 1)
        if metrics.is_new:
            metrics.describe({"config": "as it was"}, [])
        for step in range(first, 5):
            metrics.log(step, {"loss": float(number)})
        assert metrics.has("loss", 4) and not metrics.has("loss", 5) and not metrics.has("other", 4)
        metrics.close()
    assert points() == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    texts = EventAccumulator(str(tmp_path)).Reload().Tensors("config/text_summary")
    assert [event.step for event in texts] == [0]
