"""Equivalence through DeepSpeed: losses and three SGD steps against one rank in float64 that holds every pair of row and key.

SGD and not Adam, which turns a gradient that is zero in theory into noise of the size of the learning rate. CI runs every pair
of settings, a soak the whole product; on a GPU, where there is one, with its kernels and NCCL. Offload to NVMe is refused.
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
from conftest import sentences
from encoders import encoder_and_tokenizer
from torch.nn.functional import cross_entropy, normalize

from distill.objectives.queue import KeyQueue
from distill.run.collectives import rank, reduce_sums, world_size
from distill.run.precision import autocast_dtype
from distill.run.sampling import GlobalOrder
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.student.student_config import StudentConfig
from distill.training.batches import MicroBatch, ShardBatches
from distill.training.keys import Keys
from distill.training.projection import build_projection
from distill.training.task import StepContext
from distill.training.tasks.ckd import CkdConfig
from distill.training.teacher_keys import TeacherKeysModule, TeacherKeysTask

GLOBAL_BATCH, QUEUE, STEPS, LR, DIM = 33, 70, 3, 0.2, 24
SETTINGS: dict[str, tuple[Any, ...]] = {
    "world_size": (1, 2, 4),
    "zero": ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"),
    "micro_batch": (33, 8, 3),
    "placement": ("replicated", "sharded"),
    "tile": (4096, 7),
    "repeated": (False, True),
    "objective": ("ckd", "all"),
    "checkpointing": (False, True),
}
WEIGHTS = {"ckd": {"ckd": 1.0}, "all": {"ckd": 1.0, "congen": 0.5, "cosine": 2.0, "mse": 0.3}}
SAME_MEANING = 0.5


@dataclass(frozen=True)
class Cell:
    world_size: int
    zero: str
    micro_batch: int
    placement: str
    tile: int
    repeated: bool
    objective: str
    checkpointing: bool


def every_cell() -> list[Cell]:
    return [Cell(*values) for values in itertools.product(*SETTINGS.values())]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[bool, Path]:
    """A shard set of 300 sentences; and one where a hundred occur twice, so that batches and the queue hold repetitions."""
    made = {}
    for repeated in (False, True):
        texts = sentences(200 if repeated else 300)
        texts += texts[:100] if repeated else []
        made[repeated] = write_set(tmp_path_factory.mktemp("set"), texts, DIM)
    return made


def new_module(
    folder: Path, encoder_folder: Path, objective: str, amp: torch.dtype | None = None, **changes: Any
) -> tuple[TeacherKeysModule, ShardReader, GlobalOrder]:
    reader = ShardReader(folder)
    encoder, tokenizer = encoder_and_tokenizer(StudentConfig(init=str(encoder_folder), layers=[0, 2]), None, 0)
    student = Student(encoder, tokenizer, pooling="mean", max_length=32)
    set_dropout(student.encoder, 0.0)
    config = CkdConfig(
        global_batch=GLOBAL_BATCH, queue=QUEUE, weights=WEIGHTS[objective], same_meaning=SAME_MEANING, prefill=True, **changes
    )
    torch.manual_seed(0)
    projection = build_projection(student.width, reader.dim, config.projection)
    module = TeacherKeysModule(student, projection, config, amp)
    return module, reader, GlobalOrder(reader.shard_rows, global_batch=GLOBAL_BATCH, seed=0)


def parameters_of(module: TeacherKeysModule) -> dict[str, np.ndarray]:
    return {
        name: p.detach().double().cpu().numpy().reshape(-1).copy()
        for name, p in module.named_parameters()
        if "pooler" not in name
    }


def reference(folder: Path, encoder_folder: Path, objective: str) -> tuple[list[float], list[dict[str, np.ndarray]]]:
    """Losses and parameters after each step: one process, float64, all pairs at once, textbook formulas."""
    module, reader, order = new_module(folder, encoder_folder, objective)
    module.double()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    weights, ordered = module.weights, [row for step in range(-3, STEPS) for row in _length_sorted(reader, order, step)]
    losses, states = [], []
    for step in range(STEPS):
        end = (step + 3) * GLOBAL_BATCH
        rows, past = np.array(ordered[end : end + GLOBAL_BATCH]), np.array(ordered[end - QUEUE : end])
        key_rows = np.concatenate([rows, past])
        keys, ids = torch.from_numpy(reader.vectors(key_rows)).double(), torch.from_numpy(reader.hashes(key_rows))
        teacher, own = keys[:GLOBAL_BATCH], torch.arange(GLOBAL_BATCH)
        vectors = module.student(module.student.tokenize(reader.texts(rows))).double()
        projected = vectors if module.projection is None else module.projection(vectors)
        queries = normalize(projected, dim=1)
        excluded = (ids[:GLOBAL_BATCH, None] == ids) | (teacher @ keys.T >= SAME_MEANING)
        excluded[own, own] = False
        logits = module.temperature.logit_scale.exp() * queries @ keys.T
        loss = weights["ckd"] * cross_entropy(logits.masked_fill(excluded, -torch.inf), own)
        if "congen" in weights:
            soft = torch.softmax(teacher @ keys.T / module.config.teacher_temperature, dim=1)
            loss = loss + weights["congen"] * cross_entropy(queries @ keys.T / module.config.student_temperature, soft)
            loss = loss + weights["cosine"] * (1 - (queries * teacher).sum(dim=1)).mean()
            loss = loss + weights["mse"] * (projected - teacher).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        states.append(parameters_of(module))
    return losses, states


def _length_sorted(reader: ShardReader, order: GlobalOrder, step: int) -> list[int]:
    rows = order.batch(step)
    lengths = reader.lengths(rows)
    return [int(rows[i]) for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i))]


def run_cells(
    cells: list[Cell], sets: dict[bool, Path], encoder_folder: Path, device: str = "cpu", amp: torch.dtype | None = None
) -> list[Any]:
    """For each cell its losses and, on rank 0, its parameters after each step."""
    import deepspeed

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if device == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    return [run_cell(cell, sets[cell.repeated], encoder_folder, torch.device(device), amp) for cell in cells]


def run_cell(
    cell: Cell, folder: Path, encoder_folder: Path, device: torch.device, amp: torch.dtype | None
) -> tuple[list[float], list[dict[str, np.ndarray]]]:
    import deepspeed

    options = {"tile": cell.tile, "queue_placement": cell.placement}
    module, reader, order = new_module(folder, encoder_folder, cell.objective, amp, micro_batch=cell.micro_batch, **options)
    module.to(device)
    if cell.checkpointing:
        module.student.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    batches = ShardBatches(reader, order, module.student, micro_batch=cell.micro_batch, rank=rank(), world_size=world_size())
    settings = json.loads((Path(__file__).parents[2] / f"configs/deepspeed/{cell.zero}.json").read_text())
    settings |= {"train_micro_batch_size_per_gpu": cell.micro_batch, "gradient_accumulation_steps": batches.num_micro}
    settings |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    if "zero3" in cell.zero:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    task = TeacherKeysTask(module, batches, device)
    losses, states = [], []
    for step in range(STEPS):
        micro = [part.to(device) for part in task.load(step)]
        context = task.prepare_step(step, micro, is_logged=False)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in micro:
            loss, _ = engine(part, context)
            engine.backward(loss * (world_size() * len(micro) / GLOBAL_BATCH))
            total += loss.detach().double()
            engine.step()
        task.after_step(context)
        losses.append(reduce_sums({"loss": total})["loss"] / GLOBAL_BATCH)
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled="zero3" in cell.zero):
            states.append(parameters_of(module))
    engine.destroy()
    return losses, states


@pytest.fixture(scope="module")
def references(sets, tiny_encoder):
    return {(r, o): reference(sets[r], tiny_encoder, o) for r in SETTINGS["repeated"] for o in SETTINGS["objective"]}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("choose", [every_pair, pytest.param(list, marks=pytest.mark.soak)], ids=["pairs", "all"])
def test_every_cell_is_the_float64_reference_to_rounding(choose, world_size, sets, references, tiny_encoder):
    """float32 against float64: the loss to 2e-6 of itself, a parameter to 1e-4 of its largest change so far.

    The loss differs by the rounding of one forward pass. A gradient differs by some 1e-5 of itself, since it is a difference
    of nearly equal vectors (what is attended to, and the own key), and the second and third step build on the one before.
    """
    cells = [cell for cell in choose(every_cell()) if cell.world_size == world_size]
    start = parameters_of(new_module(sets[False], tiny_encoder, "ckd")[0])
    errors = [
        errors_within_rounding(cell, trained, references[cell.repeated, cell.objective], start)
        for cell, trained in results_of(cells, world_size, run_cells, sets, tiny_encoder)
    ]
    worst_loss, worst_update = np.max(errors, axis=0)
    print(f"W={world_size}: {len(cells)} cells, loss within {worst_loss:.1e}, updates within {worst_update:.1e}")


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@GPU
def test_every_pair_on_a_gpu_in_float32(sets, references, tiny_encoder):
    worst_loss, worst_update = np.max(errors_in(("cuda", None), sets, references, tiny_encoder), axis=0)
    assert worst_loss < 1e-5 and worst_update < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_every_pair_in_the_precision_of_the_device(device, sets, references, tiny_encoder):
    """Against float64. bf16 has 8 bits: the loss to 1% of itself, and all updates together to 3% of their length. A device
    without bf16 instructions computes in fp32, to fp32's limits."""
    amp = autocast_dtype("auto", torch.device(device))
    worst_loss, worst_update = np.max(errors_in((device, amp), sets, references, tiny_encoder), axis=0)
    assert (worst_loss < 1e-2 and worst_update < 0.03) if amp else (worst_loss < 1e-5 and worst_update < 1e-3)


def errors_in(where: tuple[str, torch.dtype | None], sets, references, tiny_encoder) -> list[tuple[float, float]]:
    """Of every pair at W = 1, on a device and in a precision: the largest relative errors of a loss and of an update."""
    cells = every_pair([cell for cell in every_cell() if cell.world_size == 1])
    start = flat(parameters_of(new_module(sets[False], tiny_encoder, "ckd")[0]))
    backend = "gloo" if where[0] == "cpu" else "nccl"
    errors = []
    for cell, (losses, states) in results_of(cells, 1, run_cells, sets, tiny_encoder, *where, backend=backend):
        expected = references[cell.repeated, cell.objective]
        updates = [flat(wanted) - start for wanted in expected[1]]
        wrong = [np.linalg.norm(flat(state) - start - update) for state, update in zip(states, updates, strict=True)]
        error = max(size / np.linalg.norm(update) for size, update in zip(wrong, updates, strict=True))
        errors.append((np.abs(np.array(losses) / expected[0] - 1).max(), error))
    print(f"{where}: {len(cells)} cells, losses within {max(errors)[0]:.1e}, updates {max(e[1] for e in errors):.1e}")
    return errors


def flat(state: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([state[name] for name in sorted(state)])


def test_repetitions_and_equal_meanings_matter(sets, references, tiny_encoder):
    """The settings differ in what they compute, so that a cell that ignored them would fail."""
    losses = {key: found[0] for key, found in references.items()}
    assert abs(losses[True, "ckd"][0] - losses[False, "ckd"][0]) > 1e-3
    reader = ShardReader(sets[True])
    vectors = reader.vectors(np.arange(len(reader))).astype(np.float64)
    fraction = (vectors @ vectors.T >= SAME_MEANING).mean() - 1 / len(reader)
    assert 0.001 < fraction < 0.2


def test_a_term_that_needs_all_keys_is_refused_where_the_queue_is_sharded(sets, tiny_encoder):
    module, _, _ = new_module(sets[False], tiny_encoder, "ckd")
    vectors, hashes = torch.zeros(2, DIM, dtype=torch.float16), torch.arange(2)
    micro = MicroBatch([], torch.arange(2), vectors, hashes, 2)
    for sharded in (False, True):
        context = StepContext(0, keys=Keys(vectors, hashes, KeyQueue(4, DIM), sharded))
        inputs = module._term_inputs(torch.ones(2, DIM), micro, torch.ones(1), context)
        if not sharded:
            assert len(inputs.all_keys()) == 2
    with pytest.raises(ValueError, match=r"a loss term of ckd\.weights needs all keys .* set ckd\.queue_placement=replicated"):
        inputs.all_keys()
