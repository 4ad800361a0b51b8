"""The compact stage: each term is its formula, and terms with keys compare rows with the teacher's compact vectors."""

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
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from distill.objectives.loss_terms.relational import Relational
from distill.run.collectives import add_over_ranks, rank, world_size
from distill.run.files import read_json
from distill.run.sampling import GlobalOrder
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.student.student_config import StudentConfig
from distill.training.batches import ShardBatches
from distill.training.projection import Sample
from distill.training.tasks.hpd import HpdConfig, HpdModule, fit_head, fit_whitening
from distill.training.teacher_keys import TeacherKeysTask

GLOBAL_BATCH, QUEUE, DIM, COMPACT = 32, 50, 24, 8
WEIGHTS = {"pca": 2.0, "cosine": 0.7, "relational": 0.6, "ckd": 0.3, "congen": 0.4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), sentences(300), DIM)


def new_task(
    shards: Path, encoder_folder: Path, weights: dict[str, float], *, head: str = "linear", micro_batch: int = 8
) -> TeacherKeysTask:
    reader = ShardReader(shards)
    encoder, tokenizer = encoder_and_tokenizer(StudentConfig(init=str(encoder_folder), layers=[0, 2]), None, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)
    set_dropout(student.encoder, 0.0)
    student.add_head(COMPACT, head, seed=0)
    config = HpdConfig(
        global_batch=GLOBAL_BATCH, queue=QUEUE, weights=weights, dim=COMPACT, nested=[4, 2], prefill=True, head=head
    )
    components = torch.from_numpy(reader.moments.pca(COMPACT)[0]).float()
    order = GlobalOrder(reader.shard_rows, global_batch=GLOBAL_BATCH, seed=0)
    batches = ShardBatches(reader, order, student, micro_batch=micro_batch, rank=rank(), world_size=world_size())
    return TeacherKeysTask(HpdModule(student, components, config, None), batches, torch.device("cpu"))


def test_the_loss_is_the_sum_of_its_formulas(shards, tiny_encoder):
    task = new_task(shards, tiny_encoder, WEIGHTS)
    module, reader = task.module, ShardReader(shards)
    micro = task.load(0)
    context = task.prepare_step(0, micro, is_logged=False)
    keys = context.keys
    assert keys is not None and keys.queue.keys.shape == (QUEUE, COMPACT) and keys.vectors.shape == (GLOBAL_BATCH, COMPACT)
    found = sum(module(part, context)[0].item() for part in micro)

    ordered = np.concatenate([task.batches.rows(step) for step in (-2, -1, 0)])
    rows, past = ordered[-GLOBAL_BATCH:], ordered[-GLOBAL_BATCH - QUEUE : -GLOBAL_BATCH]
    targets = torch.from_numpy(reader.vectors(np.concatenate([rows, past]))).float() @ module.components.T
    vectors, own = module.student(module.student.tokenize(reader.texts(rows))), targets[:GLOBAL_BATCH]
    queries, compact = normalize(vectors, dim=1), normalize(targets, dim=1)
    soft = torch.softmax(compact[:GLOBAL_BATCH] @ compact.T / 0.05, dim=1)
    others = ~torch.eye(GLOBAL_BATCH, dtype=torch.bool)
    whole = torch.from_numpy(reader.vectors(rows)).float()
    like = torch.softmax((whole @ whole.T / 0.05)[others].view(GLOBAL_BATCH, -1), dim=1)

    def relations(size: int) -> torch.Tensor:
        cut = normalize(vectors[:, :size], dim=1)
        return cross_entropy((cut @ cut.T / 0.05)[others].view(GLOBAL_BATCH, -1), like, reduction="sum")

    scale = module.temperature()
    terms = {
        "pca": (vectors - own).square().mean(dim=1).sum(),
        "cosine": sum((1 - cosine_similarity(vectors[:, :k], own[:, :k])).sum() for k in (8, 4, 2)) / 3,
        "relational": sum(relations(k) for k in (8, 4, 2)) / 3,
        "ckd": cross_entropy(scale * queries @ compact.T, torch.arange(GLOBAL_BATCH), reduction="sum"),
        "congen": cross_entropy(queries @ compact.T / 0.05, soft, reduction="sum"),
    }
    expected = sum(WEIGHTS[name] * term.item() for name, term in terms.items())
    assert found == pytest.approx(expected, rel=1e-3)  # keys are stored in half precision


def test_the_papers_loss_needs_no_keys(shards, tiny_encoder):
    task = new_task(shards, tiny_encoder, {"pca": 1.0}, head="tanh")
    micro = task.load(0)
    context = task.prepare_step(0, micro, is_logged=True)
    assert context.keys is None and len(task.queue) == 0
    loss, _ = task.module(micro[0], context)
    assert loss.item() > 0


def relational_step(shards: Path, encoder_folder: Path, micro_batch: int) -> tuple[float, np.ndarray]:
    """The loss of a step's rows on all ranks and its gradient, as one vector."""
    torch.manual_seed(0)
    task = new_task(shards, encoder_folder, {"relational": 1.0}, micro_batch=micro_batch)
    micro = task.load(1)
    context = task.prepare_step(1, micro, is_logged=True)
    loss = sum(task.module(part, context)[0] for part in micro)
    loss.backward()
    trained = [parameter for parameter in task.module.student.parameters() if parameter.grad is not None]
    gradient = add_over_ranks(torch.cat([parameter.grad.flatten() for parameter in trained]))
    references = context.observations()["reference_loss/relational"]
    assert len(references) == sum(len(part.positions) for part in micro) and bool((references > 0).all())
    return add_over_ranks(loss.detach().double()).item(), gradient.numpy()


@pytest.mark.parametrize("micro_batch", [32, 5])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_relations_are_of_the_whole_batch_whatever_the_ranks_and_micro_batches(shards, tiny_encoder, num_ranks, micro_batch):
    """Against the loss of all rows at once, in one graph."""
    task = new_task(shards, tiny_encoder, {"relational": 1.0})
    reader, rows, student = ShardReader(shards), task.batches.rows(1), task.module.student
    vectors = student(student.tokenize(reader.texts(rows)))
    whole = torch.from_numpy(reader.vectors(rows)).float()
    relational = task.module.batch_terms["relational"]
    expected = relational.losses(vectors, whole, torch.arange(GLOBAL_BATCH), task.module.nested)[0].sum()
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).numpy()
    for loss, found in on_ranks(num_ranks, partial(relational_step, shards, tiny_encoder, micro_batch)):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert found.shape == gradient.shape
        assert np.abs(found - gradient).max() < 1e-4 * np.abs(gradient).max()


def test_the_teacher_may_be_whitened_before_relations_are_computed(shards):
    reader = ShardReader(shards)
    teacher = reader.vectors(np.arange(GLOBAL_BATCH)).astype(np.float64)
    stored = reader.vectors(np.arange(len(reader))).astype(np.float64)
    eigenvalues, columns = np.linalg.eigh(np.cov(stored.T, bias=True))
    whitened = torch.from_numpy(teacher @ columns / eigenvalues**0.125).float()
    config = HpdConfig(dim=COMPACT, nested=[4], weights={"relational": 1.0}, whitening=0.25)
    assert fit_whitening(config.model_copy(update={"whitening": 0.0}), reader) is None
    relational = Relational(config)
    vectors, rows = torch.randn(GLOBAL_BATCH, COMPACT), torch.arange(GLOBAL_BATCH)
    expected = relational.losses(vectors, normalize(whitened, dim=1), rows, [COMPACT, 4])
    relational.whitening = fit_whitening(config, reader)
    found_losses = relational.losses(vectors, torch.from_numpy(teacher), rows, [COMPACT, 4])
    for found, wanted in zip(found_losses, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["tanh", "linear"])
def test_the_head_begins_where_it_is_better_than_chance(shards, tiny_encoder, head):
    module = new_task(shards, tiny_encoder, {"pca": 1.0}, head=head).module
    student, reader = module.student, ShardReader(shards)
    texts = reader.texts(range(len(reader)))
    targets = reader.vectors(range(len(reader))).astype(np.float64) @ module.components.numpy().T
    before = np.square(student.encode(texts, normalize=False) - targets).mean()
    fit_head(student, Sample(texts, [None] * len(texts), targets), targets)
    after = np.square(student.encode(texts, normalize=False) - targets).mean()
    assert after < np.square(targets - targets.mean(axis=0)).mean() < before


def test_a_known_map_is_kept_up_to_a_factor(shards, tiny_encoder):
    module = new_task(shards, tiny_encoder, {"pca": 1.0}).module
    student, reader = module.student, ShardReader(shards)
    texts = reader.texts(range(len(reader)))
    weight, bias = np.random.default_rng(0).normal(size=(COMPACT, student.width)), np.ones(COMPACT)
    targets = reader.vectors(range(len(reader))).astype(np.float64) @ module.components.numpy().T
    fit_head(student, Sample(texts, [None] * len(texts), targets), targets, known=(weight, bias))
    linear = student.head[0]
    factor = linear.bias[0].item()
    assert np.allclose(linear.weight.detach().numpy(), factor * weight, rtol=1e-5)
    found = student.encode(texts, normalize=False)
    assert abs(np.vdot(targets - found, found)) < 1e-4 * np.vdot(found, found)  # no other factor brings it nearer


def test_hpd_may_begin_with_the_bare_encoder(embedded_copy):
    config, directory = embedded_copy
    (results,) = on_ranks(1, train_stage, config, "hpd", ["hpd.init=student"])
    assert results["steps"] == 3 and read_json(directory / "hpd/DONE.json")["inputs"].keys() == {"shards"}
    assert Student.load(directory / "hpd/student").dim == 16
