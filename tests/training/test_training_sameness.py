"""Equivalence: loss and gradient do not depend on world size, micro-batch or tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_config
from distributed_ranks import on_ranks
from encoders import encoder_and_tokenizer
from engines import embed_text

from distill.config import load_config
from distill.run.collectives import gather_rows, gather_with_gradient, rank, reduce_sums, world_size
from distill.run.sampling import GlobalOrder
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.training import teacher_keys
from distill.training.batches import ShardBatches, token_budget
from distill.training.projection import build_projection
from distill.training.teacher_keys import TeacherKeysModule, TeacherKeysTask


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_encoder):
    return load_config(embed_text(write_config(tmp_path_factory.mktemp("run"), tiny_encoder)))


def losses_and_gradient(config, global_batch: int, micro_batch: int, tile: int, changes: dict, tokens: int | None = None):
    """The losses of three steps; and of the third, the gradient as the engine averages it and what is observed of its rows.

    tokens: instead of micro_batch, the tokens of a micro-batch.
    """
    reader = ShardReader(config.run_dir / "shards")
    encoder, tokenizer = encoder_and_tokenizer(config.student, config.teacher.model, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)
    set_dropout(student.encoder, 0.0)
    ckd = config.ckd.model_copy(update={"global_batch": global_batch, "tile": tile, **changes})
    torch.manual_seed(0)
    module = TeacherKeysModule(student, build_projection(student.width, reader.dim, ckd.projection), ckd, None)
    order = GlobalOrder(reader.shard_rows, global_batch=global_batch, seed=0)
    size = micro_batch if tokens is None else token_budget(tokens, reader, student)
    batches = ShardBatches(reader, order, student, micro_batch=size, rank=rank(), world_size=world_size())
    task = TeacherKeysTask(module, batches, torch.device("cpu"))
    losses, rows_differ = [], False
    for step in range(3):
        module.zero_grad()
        micro = task.load(step)
        rows_differ |= np.ptp([part.most_rows for part in micro]) > 1
        context = task.prepare_step(step, micro, is_logged=True)
        total = torch.zeros(())
        for part in micro:
            loss, _ = module(part, context)
            (loss * world_size() / global_batch).backward()
            total = total + loss.detach()
        losses.append(reduce_sums({"loss": total.double()})["loss"] / global_batch)
        task.after_step(context)
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    if dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= world_size()
    assert bool(rows_differ) is (tokens is not None)
    observed = {name: rows.double().sum() for name, rows in context.observations().items()}
    return losses, gradient.numpy(), reduce_sums(observed)


@pytest.mark.parametrize("global_batch, micro_batch, tile", [(32, 32, 4096), (32, 5, 7), (33, 8, 64), (5, 1, 4096)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"queue_placement": "replicated", "queue": 128},
        {"queue_placement": "sharded", "queue": 129, "prefill": True, "same_meaning": 0.9},
        {"queue_placement": "sharded", "weights": {"congen": 1.0}, "projection": "linear"},
        {"weights": {"ckd": 1.0, "congen": 1.0, "mse": 0.1}, "group_shuffling": True},
    ],
    ids=["replicated", "sharded", "sharded, soft labels", "shuffled"],
)
def test_loss_and_gradient_are_the_same_on_1_2_and_3_ranks(run, monkeypatch, size, global_batch, micro_batch, tile, changes):
    """And so are their reference losses, of the same sample of rows."""
    monkeypatch.setattr(teacher_keys, "REFERENCE_ROWS", 10)
    losses, gradient, observed = losses_and_gradient(run, global_batch, global_batch, 4096, changes)
    terms = changes.get("weights", {"ckd": 1, "cosine": 10}).keys()
    assert {f"reference_loss/{name}" for name in terms & {"ckd", "congen"}} < observed.keys()  # the others' is 0
    for found_losses, found_gradient, found in on_ranks(
        size, losses_and_gradient, run, global_batch, micro_batch, tile, changes
    ):
        assert np.allclose(found_losses, losses, atol=1e-5, rtol=0)
        assert np.abs(found_gradient - gradient).max() <= 1e-5
        assert found.keys() == observed.keys()
        for name, value in observed.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_loss_and_gradient_are_the_same_in_micro_batches_by_tokens(run, monkeypatch, size, placement):
    monkeypatch.setattr(teacher_keys, "REFERENCE_ROWS", 10)
    changes = {"queue_placement": placement, "queue": 129, "prefill": True, "same_meaning": 0.9}
    losses, gradient, observed = losses_and_gradient(run, 33, 33, 4096, changes)
    for found_losses, found_gradient, found in on_ranks(size, losses_and_gradient, run, 33, 33, 4096, changes, 80):
        assert np.allclose(found_losses, losses, atol=1e-5, rtol=0)
        assert np.abs(found_gradient - gradient).max() <= 1e-5
        assert found == pytest.approx(observed, rel=1e-5, abs=1e-5)


def test_micro_batches_have_about_as_many_padded_tokens_as_the_budget(run):
    """Also where a byte is a token in some texts, and five are in others."""
    reader = ShardReader(run.run_dir / "shards")
    encoder, tokenizer = encoder_and_tokenizer(run.student, run.teacher.model, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)
    words = student.token_ids

    def mixed(texts, roles=None):  # of every other text, a token more for each
        return [ids + ids if len(text) % 2 else ids for text, ids in zip(texts, words(texts, roles), strict=True)]

    student.max_length, student.token_ids = 64, mixed
    order = GlobalOrder(reader.shard_rows, global_batch=256, seed=0)
    budget = token_budget(600, reader, student)
    sizes = []
    for number in range(2):
        batches = ShardBatches(reader, order, student, micro_batch=budget, rank=number, world_size=2)
        sizes += [sum(chunk["input_ids"].numel() for chunk in part.tokens) for part in batches(0)]
    assert max(sizes) <= 1.15 * 600 and len(sizes) > 6
    full = np.sort(sizes)[2:]  # the last one of each rank is what is left
    assert full.min() >= 0.6 * 600


def gathered(total: int):
    rows = torch.arange(total, dtype=torch.float32)[rank() :: world_size(), None].expand(-1, 2).clone().requires_grad_()
    everything = gather_with_gradient(rows, total)
    # each rank's loss weighs row i of the gathered rows by i: the gradient must add up over ranks
    (everything[:, 0] * torch.arange(total)).sum().backward()
    return gather_rows(rows.detach(), total)[:, 0].tolist(), rows.grad[:, 0].tolist()


@pytest.mark.parametrize("total", [4, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathering_restores_the_order_of_rows_and_its_gradient_sums_over_ranks(size, total):
    for number, (rows, gradient) in enumerate(on_ranks(size, gathered, total)):
        assert rows == list(range(total))
        assert gradient == [size * i for i in range(total)][number::size]


def queues_agree(run, placement: str, prefill: bool):
    """Whether a queue restored at each step is the one that was pushed up to there; the bytes it takes."""
    ckd = run.ckd.model_copy(update={"queue_placement": placement, "prefill": prefill, "queue": 130})
    reader = ShardReader(run.run_dir / "shards")
    order = GlobalOrder(reader.shard_rows, global_batch=32, seed=0)
    encoder, tokenizer = encoder_and_tokenizer(run.student, run.teacher.model, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)

    def new_task() -> TeacherKeysTask:
        batches = ShardBatches(reader, order, student, micro_batch=8, rank=rank(), world_size=world_size())
        return TeacherKeysTask(TeacherKeysModule(student, None, ckd, None), batches, torch.device("cpu"))

    straight, resumed, hashes = new_task(), new_task(), []
    for step in range(order.steps_per_epoch + 3):
        resumed.restore(step)
        assert torch.equal(resumed.queue.ids, straight.queue.ids)
        assert torch.equal(resumed.queue.keys, straight.queue.keys)
        hashes.append(straight.queue.ids.tolist())
        straight.after_step(straight.prepare_step(step, straight.load(step), is_logged=False))
    return hashes, straight.queue.num_bytes


@pytest.mark.parametrize("prefill", [False, True])
def test_the_queue_is_restored_as_it_was_and_sharding_only_divides_it(run, prefill):
    whole, num_bytes = queues_agree(run, "sharded", prefill)
    assert len(whole[0]) == (130 if prefill else 0) and len(whole[-1]) == 130
    for size in (2, 4):
        parts = on_ranks(size, queues_agree, run, "sharded", prefill)
        for step, hashes in enumerate(whole):
            assert sorted(h for part, _ in parts for h in part[step]) == sorted(hashes)
        assert max(held for _, held in parts) <= -(-130 // size) * num_bytes // 130
    for hashes, held in on_ranks(2, queues_agree, run, "replicated", prefill):
        assert hashes == whole and held == num_bytes
