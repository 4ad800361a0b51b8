"""Students against each other: the gathered loss, with its gradient kept in the graph or cached, is that of one rank.

Losses and three SGD steps through DeepSpeed against one process in float64 with textbook formulas, dropout off. CI runs every
pair of settings, a soak the whole product.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import errors_within_rounding, every_pair, results_of, write_set
from conftest import make_encoder, sentences
from encoders import encoder_and_tokenizer
from engines import SHIPPED, start_deepspeed
from live_bytes import LiveBytes
from torch.nn.functional import cross_entropy, normalize

from distill.run.collectives import reduce_sums, world_size
from distill.run.sampling import GlobalOrder, length_order
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.student.student_config import StudentConfig
from distill.training.contrast import ContrastModule, ContrastTask, TeacherMap
from distill.training.tasks.finetune import FinetuneConfig, Triplets
from distill.training.tasks.simcse import SimcseConfig, TextPairs
from distill.training.train_config import TemperatureConfig

GLOBAL_BATCH, STEPS, LR, DIM = 33, 3, 0.05, 24
SETTINGS: dict[str, tuple[Any, ...]] = {
    "world_size": (1, 2, 4),
    "zero": ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"),
    "micro_batch": (33, 8, 3),
    "kind": ("triplets", "texts"),
    "replay": (False, True),
    "checkpointing": (False, True),
}


@dataclass(frozen=True)
class Cell:
    world_size: int
    zero: str
    micro_batch: int
    kind: str
    replay: bool
    checkpointing: bool


CELLS = [Cell(*values) for values in itertools.product(*SETTINGS.values())]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """300 sentences, a hundred of them twice."""
    texts = sentences(200)
    return write_set(tmp_path_factory.mktemp("set"), texts + texts[:100], DIM)


def triplets(count: int = 120) -> Triplets:
    """Of 40 sentences, so that a sentence is the anchor, the positive and the negative of several rows."""
    texts, draw = sentences(40, seed=1), np.random.default_rng(0)
    return Triplets([tuple(texts[row] for row in draw.choice(40, size=3, replace=False)) for _ in range(count)], [(None,) * 3])


def new_task(
    shards: Path, encoder_folder: Path, kind: str, replay: bool, *, micro_batch: int, dropout: float = 0.0, **changes: Any
) -> ContrastTask:
    reader = ShardReader(shards)
    encoder, tokenizer = encoder_and_tokenizer(StudentConfig(init=str(encoder_folder), layers=[0, 2]), None, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)
    set_dropout(student.encoder, dropout)
    section = FinetuneConfig if kind == "triplets" else SimcseConfig
    options = {"global_batch": GLOBAL_BATCH, "micro_batch": micro_batch, "teacher_weight": 0.5 if replay else 0.0} | changes
    config = section(temperature=TemperatureConfig(scale=5.0), **options)
    torch.manual_seed(0)
    projection = torch.nn.Linear(student.width, reader.dim) if replay else None
    rows = triplets(max(120, config.global_batch)) if kind == "triplets" else TextPairs(reader)
    module = ContrastModule(student, config, None, num_views=rows.num_views, to_teacher=TeacherMap(projection=projection))
    return ContrastTask(module, rows, reader if replay else None, seed=0)


def parameters_of(module: ContrastModule) -> dict[str, np.ndarray]:
    return {
        name: p.detach().double().numpy().reshape(-1).copy() for name, p in module.named_parameters() if "pooler" not in name
    }


def reference(shards: Path, encoder_folder: Path, kind: str, replay: bool) -> tuple[list[float], list[dict[str, np.ndarray]]]:
    """Losses and parameters after each step: one process, float64, all at once."""
    task = new_task(shards, encoder_folder, kind, replay, micro_batch=GLOBAL_BATCH)
    module, reader = task.module.double(), ShardReader(shards)
    student = module.student
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    losses, states = [], []
    for step in range(STEPS):
        numbers = GlobalOrder(task.rows.shard_rows, global_batch=GLOBAL_BATCH, seed=0).batch(step)
        rows = list(zip(*task.rows.views(numbers), strict=True))
        vectors = [normalize(student(student.tokenize(list(view))).double(), dim=1) for view in zip(*rows, strict=True)]
        candidates = torch.cat(vectors[1:])
        names = [row[view] for view in range(1, len(vectors)) for row in rows]
        excluded = torch.tensor(
            [[name in row[:2] and j % GLOBAL_BATCH != i for j, name in enumerate(names)] for i, row in enumerate(rows)]
        )
        logits = module.temperature.logit_scale.exp() * vectors[0] @ candidates.T
        loss = cross_entropy(logits.masked_fill(excluded, -torch.inf), torch.arange(GLOBAL_BATCH))
        assert excluded.any()
        if replay:
            replayed = GlobalOrder(reader.shard_rows, global_batch=GLOBAL_BATCH, seed=0).batch(step)
            projected = module.projection(student(student.tokenize(reader.texts(replayed))).double())
            teacher = torch.from_numpy(reader.vectors(replayed)).double()
            loss = loss + 0.5 * (1 - (normalize(projected, dim=1) * teacher).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        states.append(parameters_of(module))
    return losses, states


def run_cells(cells: list[Cell], shards: Path, encoder_folder: Path) -> list[Any]:
    start_deepspeed()
    return [run_cell(cell, shards, encoder_folder) for cell in cells]


def run_cell(cell: Cell, shards: Path, encoder_folder: Path) -> tuple[list[float], list[dict[str, np.ndarray]]]:
    import deepspeed

    task = new_task(shards, encoder_folder, cell.kind, cell.replay, micro_batch=cell.micro_batch)
    module = task.module
    if cell.checkpointing:
        module.student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    settings = json.loads((SHIPPED / f"{cell.zero}.json").read_text())
    settings |= {"train_micro_batch_size_per_gpu": cell.micro_batch, "gradient_accumulation_steps": task.num_micro}
    settings |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    if "zero3" in cell.zero:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    losses, states = [], []
    for step in range(STEPS):
        micro = task.load(step)
        context = task.prepare_step(step, micro, is_logged=False)
        assert bool(context.first_pass) == (len(micro) > 1)
        total = torch.zeros((), dtype=torch.float64)
        for part in micro:
            loss, logged = engine(part, context)
            engine.backward(loss * (world_size() * len(micro) / GLOBAL_BATCH))
            total += loss.detach().double()
            assert len(logged) >= 3
            engine.step()
        task.after_step(context)
        losses.append(reduce_sums({"loss": total})["loss"] / GLOBAL_BATCH)
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled="zero3" in cell.zero):
            states.append(parameters_of(module))
    engine.destroy()
    return losses, states


@pytest.fixture(scope="module")
def references(shards, tiny_encoder):
    return {(k, r): reference(shards, tiny_encoder, k, r) for k in SETTINGS["kind"] for r in SETTINGS["replay"]}


@pytest.mark.parametrize(
    "world_size", [pytest.param(2, marks=pytest.mark.slow), *(pytest.param(size, marks=pytest.mark.soak) for size in (1, 4))]
)
@pytest.mark.parametrize("choose", [every_pair, pytest.param(list, marks=pytest.mark.soak)], ids=["pairs", "all"])
def test_every_cell_is_the_float64_reference_to_rounding(choose, world_size, shards, references, tiny_encoder):
    cells = [cell for cell in choose(CELLS) if cell.world_size == world_size]
    errors = []
    for cell, trained in results_of(cells, world_size, run_cells, shards, tiny_encoder):
        start = parameters_of(new_task(shards, tiny_encoder, cell.kind, cell.replay, micro_batch=8).module)
        errors.append(errors_within_rounding(cell, trained, references[cell.kind, cell.replay], start))
    worst_loss, worst_update = np.max(errors, axis=0)
    print(f"W={world_size}: {len(cells)} cells, loss within {worst_loss:.1e}, updates within {worst_update:.1e}")


def gradient_of_step(task: ContrastTask) -> tuple[float, torch.Tensor]:
    module = task.module.train()
    module.zero_grad()
    micro = task.load(0)
    context = task.prepare_step(0, micro, is_logged=False)
    total = 0.0
    for part in micro:
        loss, _ = module(part, context)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_both_passes_of_cached_gradients_see_the_same_dropout(shards, tiny_encoder):
    """If they did not, the gradient would be that of no loss: it is compared with finite differences of the loss."""
    task = new_task(shards, tiny_encoder, "texts", False, micro_batch=8, dropout=0.3)
    task.module.double()
    _, gradient = gradient_of_step(task)
    parameters = [p for p in task.module.parameters() if p.grad is not None]
    parts = (gradient / gradient.norm()).split([p.numel() for p in parameters])
    step, values = 3e-4, []
    for change in (step, -2 * step):
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.add_(change * part.view_as(parameter))
        values.append(gradient_of_step(task)[0])
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=2e-3)


def test_dropout_makes_the_views_of_a_text_differ(shards, tiny_encoder):
    with_dropout = new_task(shards, tiny_encoder, "texts", False, micro_batch=33, dropout=0.3)
    without = new_task(shards, tiny_encoder, "texts", False, micro_batch=33)
    alike = []
    for task in (with_dropout, without):
        task.module.train()
        micro = task.load(0)
        logged = task.module(micro[0], task.prepare_step(0, micro, is_logged=False))[1]
        alike.append(float(logged["similarity/positive"]) / GLOBAL_BATCH)
    assert alike[0] < 0.99 < 0.99999 < alike[1]


def test_all_rows_of_a_batch_are_assigned_in_order_of_length(shards, tiny_encoder):
    task = new_task(shards, tiny_encoder, "triplets", False, micro_batch=8)
    numbers = task.order.batch(1)
    numbers = numbers[length_order(task.rows.lengths(numbers))]
    micro = task.load(1)
    assert [len(part.positions) for part in micro] == [7, 7, 7, 6, 6]
    assert np.concatenate([part.positions for part in micro]).tolist() == list(range(GLOBAL_BATCH))
    tokens = [ids for part in micro for ids in part.tokens]
    anchors = task.module.student.token_ids(task.rows.views(numbers)[0][:7])
    assert tokens[0]["input_ids"][0].tolist()[: len(anchors[0])] == anchors[0]


def peak_of_step(task: ContrastTask) -> tuple[int, int]:
    """The peak number of bytes of live tensors in a step; and how many micro-batches it had."""
    task.module.train()
    micro = task.load(0)
    with LiveBytes() as bytes_:
        context = task.prepare_step(0, micro, is_logged=False)
        for part in micro:
            task.module(part, context)[0].backward()
    return bytes_.peak, len(micro)


@pytest.mark.slow
def test_a_batch_of_4096_takes_the_memory_of_256(tmp_path, shards):
    encoder = make_encoder(tmp_path / "wider", layers=3, width=128)

    def peak(global_batch: int) -> tuple[int, int]:
        return peak_of_step(new_task(shards, encoder, "triplets", False, micro_batch=256, global_batch=global_batch))

    (small, one), (large, many) = peak(256), peak(4096)
    assert (one, many) == (1, 16)
    # candidates and logits of a micro-batch grow with the batch; here they are a ninth of a micro-batch's activations
    assert large <= 1.15 * small, (large, small)
