"""The CKD stage: what its module computes and what a step needs beside its rows. HPD is the same in a compact space."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from distill.config import KeysConfig, TemperatureConfig
from distill.objectives.ckd import cosine_losses, mse_losses, shuffled_targets
from distill.objectives.contrast import cross_entropy
from distill.objectives.queue import KeyQueue
from distill.sampling import seed_of
from distill.student import Student
from distill.training.batches import MicroBatch, ShardBatches
from distill.training.distributed import gather_dealt_rows, rank, world_size
from distill.training.floors import measured_floors
from distill.training.keys import Keys, Masking
from distill.training.recipe import Task


class Temperature(nn.Module):
    """a = exp(logit_scale), never above `max_scale`; the clamp passes the gradient, so that it can come down again."""

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        # shape (1,): DeepSpeed cannot partition a parameter without dimensions
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.scale)), requires_grad=config.learnable)
        self.log_max = math.log(config.max_scale)

    def forward(self) -> Tensor:
        above = (self.logit_scale - self.log_max).clamp(min=0).detach()
        return (self.logit_scale - above).exp()


class CkdTask(Task):
    """Student, projection and temperature in one module, so that ZeRO-3 gathers them.

    L = sum_i [ w_ckd CKD_i + w_congen ConGen_i + w_cosine (1 - q_i.t_i) + w_mse |P(s_i) - t_i|^2 ]      q_i = norm(P(s_i))
    """

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

    @property
    def key_width(self) -> int | None:
        """The width of keys; None: the teacher's."""
        return None

    def as_keys(self, teacher: Tensor) -> Tensor:
        """The keys, fp16 and L2-normalised, that teacher vectors of the shards are: [n, d_t] -> [n, key_width]."""
        return teacher

    def forward(self, micro: MicroBatch, keys: Keys | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the rows' losses; and sums over rows of what is logged, without gradient. keys: where any are needed."""
        vectors = self.embed(micro)
        projected = vectors if self.projection is None else self.projection(vectors)
        scale = self.temperature()
        # what no term uses still takes part, so that all ranks reduce the same gradients
        total = scale.sum() * 0 + projected.sum() * 0
        projected_bd = projected[: len(micro.positions)]  # an empty micro-batch has a row of tokens
        queries_bd = nn.functional.normalize(projected_bd, dim=-1)
        losses = self.own_losses(projected_bd, queries_bd, micro)
        own_keys_bd = self.as_keys(micro.teacher)
        if keys is not None:
            losses |= self._contrast(queries_bd, scale, replace(micro, teacher=own_keys_bd), keys)
        for name, loss_b in losses.items():
            total = total + self.weights[name] * loss_b.sum()
        measured = {f"loss/{name}": loss_b.detach().sum() for name, loss_b in losses.items()}
        positive = (queries_bd.detach() * own_keys_bd.to(queries_bd.dtype)).sum()
        measured |= {"similarity/positive": positive, "temperature": scale.detach().sum() * len(queries_bd)}
        if self.measuring:
            self._measure(queries_bd.detach(), scale, replace(micro, teacher=own_keys_bd), keys)
        return total, measured

    @torch.no_grad()
    def _measure(self, queries_bd: Tensor, scale: Tensor, micro: MicroBatch, keys: Keys | None) -> None:
        """micro.teacher: as keys are."""
        self.observe({"similarity/positive": (queries_bd * micro.teacher).sum(dim=1)})
        if keys is None:
            return
        masking = Masking(self.config.same_meaning) if "ckd" in self.weights else None
        hardest_b, masked_b = keys.negatives(queries_bd, micro, masking, self.config.tile)
        self.observe({"similarity/hardest_negative": hardest_b})
        if masking is not None:
            self.observe({"negatives/masked": masked_b})
        self.observe(measured_floors(self.weights.keys() & {"ckd", "congen"}, self.config, scale, micro, keys))

    def own_losses(self, vectors_bd: Tensor, queries_bd: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
        """The terms that see nothing but the row itself: [b] each."""
        losses: dict[str, Tensor] = {}
        if "cosine" in self.weights:
            losses["cosine"] = cosine_losses(queries_bd, micro.teacher)
        if "mse" in self.weights:
            losses["mse"] = mse_losses(vectors_bd, micro.teacher)
        return losses

    def _contrast(self, queries_bd: Tensor, scale: Tensor, micro: MicroBatch, keys: Keys) -> dict[str, Tensor]:
        """The terms that see keys, of all of them in one pass: [b] each."""
        config = self.config
        student_scale = scale.new_tensor([1 / config.student_temperature])
        kinds = [(queries_bd.detach(), scale.detach())] if "ckd" in self.weights else []
        if "congen" in self.weights:
            kinds.append((queries_bd.detach(), student_scale))
            if not config.group_shuffling:
                kinds.append((micro.teacher.to(queries_bd.dtype), scale.new_tensor([1 / config.teacher_temperature])))
        queries, scales = (torch.stack(parts) for parts in zip(*kinds, strict=True))
        masking = Masking(config.same_meaning) if "ckd" in self.weights else None
        lse, attended = keys.attend(queries, scales.flatten(), micro, masking, config.tile)
        losses: dict[str, Tensor] = {}
        if "ckd" in self.weights:
            losses["ckd"] = cross_entropy(queries_bd, scale, lse[0], attended[0], micro.teacher)
        if "congen" in self.weights:
            soft = len(losses)
            targets = self._shuffled(micro, keys) if config.group_shuffling else attended[soft + 1]
            losses["congen"] = cross_entropy(queries_bd, student_scale, lse[soft], attended[soft], targets)
        return losses

    def _shuffled(self, micro: MicroBatch, keys: Keys) -> Tensor:
        seeds = [seed_of(self.seed, keys.step, position) for position in micro.positions.tolist()]
        vectors = torch.cat([keys.vectors, keys.queue.keys])
        return shuffled_targets(micro.teacher, vectors, seeds, teacher_temperature=self.config.teacher_temperature)


class CkdRecipe:
    """Keys of the global batch gathered over ranks once a step, then the queue, which is pushed when the step is taken."""

    def __init__(self, task: CkdTask, batches: ShardBatches, device: torch.device) -> None:
        self.task = task
        self.student = task.student
        self.num_micro = batches.num_micro
        self.steps_per_epoch = batches.order.steps_per_epoch
        self.load = batches
        capacity = task.config.queue if task.config.needs_keys else 0
        self.sharded = task.config.queue_placement == "sharded" and world_size() > 1 and capacity > 0
        part = {"rank": rank(), "world_size": world_size()} if self.sharded else {}
        self.queue = KeyQueue(capacity, task.key_width or batches.reader.dim, device, **part)
        self._first_step = -(-capacity // batches.order.global_batch) * -1 if task.config.prefill else 0
        self.restore(0)

    def restore(self, step: int) -> None:
        """The queue holds what was pushed before `step`, read from the shards again."""
        pushed = (step - self._first_step) * self.load.order.global_batch
        vectors, hashes = self.load.keys(self._first_step, self.queue.rows_after(pushed))
        self.queue.restore(self.task.as_keys(vectors), hashes, pushed)

    def share(self, step: int, micro: list[MicroBatch]) -> Keys | None:
        """The keys of the step, the same on every rank; two collectives. None where no term needs any."""
        if not self.task.config.needs_keys:
            return None
        total = self.load.order.global_batch
        dealt = torch.cat([part.positions for part in micro]).argsort()
        vectors = gather_dealt_rows(self.task.as_keys(torch.cat([part.teacher for part in micro]))[dealt], total)
        hashes = gather_dealt_rows(torch.cat([part.hashes for part in micro])[dealt], total)
        self._newest = vectors, hashes
        return Keys(vectors, hashes, self.queue, self.sharded, step)

    def taken(self) -> None:
        if self.task.config.needs_keys:
            self.queue.push(*self._newest)

    def floor(self, means: dict[str, float]) -> dict[str, float]:
        return {"floor": sum(weight * means.get(f"floor/{name}", 0.0) for name, weight in self.task.weights.items())}

    def state(self, step: int) -> dict[str, float]:
        """How full the queue is, and how many steps ago its keys were pushed."""
        if not self.queue.capacity:
            return {}
        per_step = self.load.order.global_batch
        filled = min((step - self._first_step) * per_step, self.queue.capacity)
        if not filled:
            return {"queue/filled": 0.0}
        whole, rest = divmod(filled, per_step)
        ages = per_step * whole * (whole + 1) / 2 + rest * (whole + 1)
        oldest = whole + (rest > 0)
        return {"queue/filled": filled / self.queue.capacity, "queue/age_mean": ages / filled, "queue/age_max": float(oldest)}
