"""Tasks that compare the student's vectors with the teacher's: the config, the module and the keys of a step.

ckd compares in the teacher's space, hpd in the space of the teacher's first principal components; everything else is the same.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn

from distill.objectives.loss_terms import (
    Attention,
    BatchTerm,
    KeyQuery,
    KeyTerm,
    LossTerm,
    RowTerm,
    TermInputs,
    loss_terms,
)
from distill.objectives.queue import KeyQueue
from distill.objectives.scale import LOWEST_SCALE, fitting_scale
from distill.run.collectives import add_over_ranks, gather_rows, gather_with_gradient, rank, world_size
from distill.run.config import result, speed
from distill.run.sampling import evenly_spread, seed_of
from distill.student import Student
from distill.training.batches import MicroBatch, ShardBatches, gather_in_order
from distill.training.keys import Keys
from distill.training.task import StepContext, Task, Temperature, TrainingModule
from distill.training.train_config import TemperatureConfig, TrainConfig

logger = logging.getLogger(__name__)
SCALE_ROWS = 4096  # of the teacher's vectors, by which the contrast's scale is chosen
REFERENCE_ROWS = 128  # rows of a global batch that reference losses are measured on: a second pass over all keys is expensive


class KeysConfig(TrainConfig):
    """Students against teacher vectors: those of the global batch and, queued, of batches before it."""

    task: ClassVar[str]
    weights: dict[str, float] = result(description="the loss is this weighted sum")
    queue: int = result(16_384, ge=0, description="past teacher vectors kept as further negatives")
    queue_placement: Literal["replicated", "sharded"] = speed(
        "replicated", description="sharded: a rank holds a W-th of the queue; for queues that one device does not hold"
    )
    prefill: bool = result(False, description="begin with a full queue, of the text's own vectors; else it fills step by step")
    temperature: TemperatureConfig = result(TemperatureConfig(), description="of the ckd term")
    same_meaning: float | None = result(
        None, gt=0, le=1, description="keys that the teacher finds this similar to the row's own are no negatives of it"
    )
    group_shuffling: bool = result(
        False, description="congen: shuffle the teacher's similarities in groups of like probability"
    )
    teacher_temperature: float = result(0.05, gt=0, description="congen: softness of the teacher's labels")
    student_temperature: float = result(0.05, gt=0, description="congen: softness of the student's")
    tokens_per_batch: int | None = speed(
        None,
        gt=0,
        description="instead of micro_batch: largest number of tokens, with padding, in one forward and backward pass of one"
        " rank, as estimated from the texts' bytes; null: micro_batch",
    )
    tile: int = speed(4096, gt=0, description="keys that a micro-batch is compared with at a time")

    @property
    def used_terms(self) -> dict[str, type[LossTerm]]:
        """The terms of a weight above 0, in the order in which they are added up."""
        used = {name: term for name, term in loss_terms().items() if self.weights.get(name)}
        return dict(sorted(used.items(), key=lambda item: (item[1].order, item[0])))

    @property
    def needs_keys(self) -> bool:
        """Whether any term compares a row with other keys than its own."""
        return any(issubclass(term, KeyTerm) for term in self.used_terms.values())

    @model_validator(mode="after")
    def _terms_and_keys_fit(self) -> KeysConfig:
        known = [name for name, term in loss_terms().items() if self.task in term.tasks]
        if unknown := [name for name in self.weights if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"weights.{unknown[0]}: no loss term of this name in {self.task}; {hint}")
        if not any(self.weights.values()) or min(self.weights.values()) < 0:
            raise ValueError(f"weights {self.weights} need at least one above 0 and none below")
        if self.needs_keys and self.queue and self.queue <= self.global_batch:
            raise ValueError(
                f"queue {self.queue} is not larger than global_batch {self.global_batch}: one push would replace it all;"
                " use 0 for no queue or a larger one"
            )
        if self.group_shuffling and (self.queue_placement == "sharded" or not self.weights.get("congen")):
            raise ValueError("group_shuffling is of congen's soft labels, and needs all keys on every rank (queue_placement)")
        if self.same_meaning is not None and not self.weights.get("ckd"):
            raise ValueError("same_meaning is of the ckd term, which has no weight")
        return self


class BatchLosses(NamedTuple):
    """What the first pass leaves of a BatchTerm for one micro-batch: losses and reference losses of its rows, [b]; and the
    gradient of all rows' losses at its vectors, [b, d]."""

    losses: Tensor
    reference_losses: Tensor
    gradients: Tensor


class TeacherKeysModule(TrainingModule):
    """Student, projection and temperature. The loss is the sum over rows of the weighted terms.

        q_i = norm(P(s_i))       s_i: the student's vector; P: the projection to the space of the targets, or none

    The space of the targets is the teacher's own; a subclass may choose another (`targets`, `as_keys`, `key_width`, `nested`).
    """

    nested: Sequence[int] = ()
    key_width: int | None = None  # None: the teacher's

    def __init__(
        self, student: Student, projection: nn.Linear | None, config: KeysConfig, amp: torch.dtype | None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.student = student
        self.projection = projection
        self.temperature = Temperature(config.temperature)
        self.config = config
        self.amp = amp
        self.seed = seed
        self.weights = {str(name): weight for name, weight in config.weights.items() if weight}
        terms = {name: term(config) for name, term in config.used_terms.items()}
        self.row_terms = {name: term for name, term in terms.items() if isinstance(term, RowTerm)}
        self.key_terms = {name: term for name, term in terms.items() if isinstance(term, KeyTerm)}
        self.batch_terms = {name: term for name, term in terms.items() if isinstance(term, BatchTerm)}

    def targets(self, teacher: Tensor) -> Tensor:
        """Teacher vectors of the shards [n, d_t] as targets [n, d]."""
        return teacher

    def as_keys(self, teacher: Tensor) -> Tensor:
        """Teacher vectors of the shards as keys: [n, d_t] -> [n, key_width] fp16, L2-normalised."""
        return teacher

    def forward(self, micro: MicroBatch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        vectors = self.embed(micro)
        projected = vectors if self.projection is None else self.projection(vectors)
        scale = self.temperature()
        # what no term uses still takes part, so that all ranks reduce the same gradients
        total = scale.sum() * 0 + projected.sum() * 0
        projected_bd = projected[: len(micro.positions)]  # an empty micro-batch has a row of tokens
        inputs = self._term_inputs(projected_bd, micro, scale, context)
        losses = {name: term.losses(inputs) for name, term in self.row_terms.items()}
        losses |= self._batch_losses(projected_bd, micro, context)
        as_keys = replace(micro, teacher=inputs.own_keys)
        losses |= self._key_losses(inputs, as_keys, context)
        for name, loss_b in losses.items():
            total = total + self.weights[name] * loss_b.sum()
        logged = {f"loss/{name}": loss_b.detach().sum() for name, loss_b in losses.items()}
        positive = (inputs.queries.detach() * inputs.own_keys.to(inputs.queries.dtype)).sum()
        logged |= {"similarity/positive": positive, "temperature": scale.detach().sum() * len(projected_bd)}
        if context.is_logged:
            self._observe(inputs, as_keys, context)
            weighted = torch.stack([self.weights[name] * loss_b.detach() for name, loss_b in losses.items()])
            context.observe_sources(micro.sources, weighted.sum(dim=0))
        return total, logged

    def _term_inputs(self, projected_bd: Tensor, micro: MicroBatch, scale: Tensor, context: StepContext) -> TermInputs:
        def all_keys() -> Tensor:
            assert context.keys is not None
            if context.keys.sharded:
                task = self.config.task
                raise ValueError(
                    f"a loss term of {task}.weights needs all keys on every rank: set {task}.queue_placement=replicated"
                )
            return torch.cat([context.keys.vectors, context.keys.queue.keys])

        return TermInputs(
            vectors=projected_bd,
            queries=nn.functional.normalize(projected_bd, dim=-1),
            targets=self.targets(micro.teacher),
            own_keys=self.as_keys(micro.teacher),
            scale=scale,
            nested=self.nested,
            all_keys=all_keys,
            row_seeds=lambda: [seed_of(self.seed, context.step, position) for position in micro.positions.tolist()],
        )

    def _key_losses(self, inputs: TermInputs, micro: MicroBatch, context: StepContext) -> dict[str, Tensor]:
        """The losses [b] of the key terms, whose queries all go through the keys in one pass."""
        queries = {name: term.queries(inputs) for name, term in self.key_terms.items()}
        if not queries or context.keys is None:
            return {}
        found = self._attend(queries, micro, context.keys)
        return {name: term.losses(inputs, found[name]) for name, term in self.key_terms.items()}

    def _attend(self, queries: dict[str, list[KeyQuery]], micro: MicroBatch, keys: Keys) -> dict[str, list[Attention]]:
        """Each query's softmax over the keys."""
        names = sorted(queries, key=lambda name: not self.key_terms[name].masks_same_text)  # as Keys.attend needs it
        flat = [query for name in names for query in queries[name]]
        lse, attended = keys.attend(
            torch.stack([query.vectors for query in flat]),
            torch.cat([query.scale.flatten() for query in flat]),
            micro,
            tile=self.config.tile,
            num_masked=sum(len(queries[name]) for name in names if self.key_terms[name].masks_same_text),
            same_meaning=self.config.same_meaning,
        )
        found = iter(map(Attention, lse, attended))
        return {name: [next(found) for _ in queries[name]] for name in names}

    def _batch_losses(self, vectors_bd: Tensor, micro: MicroBatch, context: StepContext) -> dict[str, Tensor]:
        """The losses [b] of the batch terms: from the first pass where there was one, else from vectors gathered here."""
        losses: dict[str, Tensor] = {}
        for name, term in self.batch_terms.items():
            if context.first_pass:
                cached: BatchLosses = context.first_pass[micro.index][name]
                surrogate_b = (vectors_bd * cached.gradients).sum(dim=1)  # its gradient is the cached one, its value the loss's
                losses[name], reference_b = surrogate_b - surrogate_b.detach() + cached.losses, cached.reference_losses
            else:
                order = micro.positions.argsort()
                vectors_gd = gather_with_gradient(vectors_bd[order], self.config.global_batch)
                teacher_gd = gather_rows(micro.teacher[order], self.config.global_batch)
                losses[name], reference_b = term.losses(vectors_gd, teacher_gd, micro.positions, self.nested)
            if context.is_logged:
                context.observe({f"reference_loss/{name}": reference_b})
        return losses

    def first_pass(self, micro: list[MicroBatch]) -> list[dict[str, BatchLosses]]:
        """For each micro-batch, its rows' losses of the batch terms; a collective, with the same calls on every rank.

        Gradients are cached (Gao et al. 2021): vectors are computed without gradient, gathered, and the gradient of the loss is
        taken at them; forward then computes them again, and its surrogate has that gradient.
        """
        total = self.config.global_batch
        with torch.no_grad():
            own = [self.embed(part)[: len(part.positions)] for part in micro]
        vectors_gd = gather_in_order(micro, own, total).requires_grad_()
        teacher_gd = gather_in_order(micro, [part.teacher for part in micro], total)
        found: list[dict[str, BatchLosses]] = [{} for _ in micro]
        for name, term in self.batch_terms.items():
            gradient_gd = torch.zeros_like(vectors_gd)
            losses: list[tuple[Tensor, Tensor]] = []
            for part in micro:
                losses_b, reference_b = term.losses(vectors_gd, teacher_gd, part.positions, self.nested)
                gradient_gd += torch.autograd.grad(losses_b.sum(), vectors_gd)[0]
                losses.append((losses_b.detach(), reference_b))
            over_ranks = add_over_ranks(gradient_gd)
            for part, of_rows, entry in zip(micro, losses, found, strict=True):
                entry[name] = BatchLosses(*of_rows, over_ranks[part.positions])
        return found

    @torch.no_grad()
    def _observe(self, inputs: TermInputs, micro: MicroBatch, context: StepContext) -> None:
        """Measures this rank's rows. micro.teacher: as keys are."""
        queries_bd = inputs.queries.detach()
        context.observe({"similarity/positive": (queries_bd * micro.teacher).sum(dim=1)})
        keys = context.keys
        if keys is None:
            return
        hardest_b, masked_b = keys.negatives(queries_bd, micro, tile=self.config.tile, same_meaning=self.config.same_meaning)
        context.observe({"similarity/hardest_negative": hardest_b})
        if any(term.masks_same_text for term in self.key_terms.values()):
            context.observe({"negatives/masked": masked_b})
        context.observe(self._reference_losses(inputs, micro, keys))

    def _reference_losses(self, inputs: TermInputs, micro: MicroBatch, keys: Keys) -> dict[str, Tensor]:
        """reference_loss/<term> of each sampled row; their sums over a global batch's rows are those of all its rows.

        The rows are the same at any world size; a collective where the queue is sharded.
        """
        total = len(keys.vectors)
        stride = -(-total // REFERENCE_ROWS)
        chosen = micro.positions % stride == 0
        part = replace(
            micro, **{name: getattr(micro, name)[chosen] for name in ("positions", "teacher", "hashes")}
        )  # most_rows stays: ranks pad to it
        sampled = replace(inputs, own_keys=part.teacher)
        queries = {name: [term.reference_query(sampled)] for name, term in self.key_terms.items()}
        found = self._attend(queries, part, keys)
        factor = total / -(-total // stride)
        return {
            f"reference_loss/{name}": term.reference_losses(sampled, queries[name][0], found[name][0]) * factor
            for name, term in self.key_terms.items()
        }


class TeacherKeysTask(Task):
    """Keys of the global batch gathered over ranks once a step, then the queue, which is pushed after the step."""

    def __init__(self, module: TeacherKeysModule, batches: ShardBatches, device: torch.device) -> None:
        self.module: TeacherKeysModule = module
        self.batches = batches
        self.num_micro = batches.num_micro
        self.steps_per_epoch = batches.order.steps_per_epoch
        config = module.config
        capacity = config.queue if config.needs_keys else 0
        self.sharded = config.queue_placement == "sharded" and world_size() > 1 and capacity > 0
        part = {"rank": rank(), "world_size": world_size()} if self.sharded else {}
        self.queue = KeyQueue(capacity, module.key_width or batches.reader.dim, device, **part)
        if config.weights.get("ckd") and config.temperature.scale is None:
            self._fit_temperature(config.temperature.max_scale, batches.order.global_batch + capacity)
        self._first_step = -(-capacity // batches.order.global_batch) * -1 if config.prefill else 0
        self.restore(0)

    def _fit_temperature(self, highest: float, num_keys: int) -> None:
        reader, module = self.batches.reader, self.module
        rows = evenly_spread(len(reader), SCALE_ROWS)
        keys = module.as_keys(torch.from_numpy(reader.vectors(rows)))
        scale = fitting_scale(keys, num_keys, highest, module.config.same_meaning)
        module.temperature.set_scale(scale)
        if scale > LOWEST_SCALE and rank() == 0:
            why = "the teacher's vectors lie close together"
            logger.info("%s: the contrast's scale is %g, not %g: %s", module.config.task, scale, LOWEST_SCALE, why)

    def load(self, step: int) -> list[MicroBatch]:
        return self.batches(step)

    def restore(self, step: int) -> None:
        """The queue holds what was pushed before `step`, read from the shards again."""
        pushed = (step - self._first_step) * self.batches.order.global_batch
        vectors, hashes = self.batches.keys(self._first_step, self.queue.rows_after(pushed))
        self.queue.restore(self.module.as_keys(vectors), hashes, pushed)

    def prepare_step(self, step: int, micro: list[MicroBatch], *, is_logged: bool) -> StepContext:
        """Two collectives for the keys, where any term needs them, and those of the first pass."""
        context = StepContext(step, is_logged, source_names=self.batches.samples.source_names)
        if self.module.batch_terms and len(micro) > 1:
            context.first_pass = self.module.first_pass(micro)
        if self.module.config.needs_keys:
            total = self.batches.order.global_batch
            own = self.module.as_keys(torch.cat([part.teacher for part in micro]))
            vectors = gather_in_order(micro, [own], total)
            hashes = gather_in_order(micro, [part.hashes for part in micro], total)
            context.keys = Keys(vectors, hashes, self.queue, self.sharded)
        return context

    def after_step(self, context: StepContext) -> None:
        if context.keys is not None:
            self.queue.push(context.keys.vectors, context.keys.hashes)

    def reference_losses(self, means: dict[str, float]) -> dict[str, float]:
        weights = self.module.weights.items()
        return {"reference_loss": sum(weight * means.get(f"reference_loss/{name}", 0.0) for name, weight in weights)}

    def step_metrics(self, step: int) -> dict[str, float]:
        """How full the queue is, and how many steps ago its keys were pushed."""
        if not self.queue.capacity:
            return {}
        per_step = self.batches.order.global_batch
        filled = min((step - self._first_step) * per_step, self.queue.capacity)
        if not filled:
            return {"queue/filled": 0.0}
        whole, rest = divmod(filled, per_step)
        ages = per_step * whole * (whole + 1) / 2 + rest * (whole + 1)
        oldest = whole + (rest > 0)
        return {"queue/filled": filled / self.queue.capacity, "queue/age_mean": ages / filled, "queue/age_max": float(oldest)}
