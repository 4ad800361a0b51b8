"""The CKD stage: what its module computes and what a step needs beside its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import CkdConfig, TemperatureConfig
from distill.objectives.ckd import ckd_losses, congen_losses, cosine_losses
from distill.objectives.contrast import hardest_negatives
from distill.objectives.queue import KeyQueue
from distill.student import Student
from distill.training.batches import MicroBatch, ShardBatches
from distill.training.distributed import gather_dealt_rows
from distill.training.recipe import Task


@dataclass(frozen=True)
class Keys:
    """What every micro-batch of one step sees: vectors [N, d_t] fp16 and hashes [N] int64, the global batch's G first."""

    vectors: Tensor
    hashes: Tensor


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

    L = sum_i [ w_ckd CKD_i + w_congen ConGen_i + w_cosine (1 - q_i.t_i) ]        q_i = norm(P(s_i))
    """

    def __init__(self, student: Student, teacher_dim: int, config: CkdConfig, amp: torch.dtype | None) -> None:
        super().__init__()
        self.student = student
        self.projection = build_projection(student.width, teacher_dim, config)
        self.temperature = Temperature(config.temperature)
        self.config = config
        self.amp = amp

    def forward(self, micro: MicroBatch, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the rows' losses; and sums over rows of what is logged, without gradient."""
        vectors_bd = self.embed(micro)
        projected_bd = vectors_bd if self.projection is None else self.projection(vectors_bd)
        queries_bd = nn.functional.normalize(projected_bd, dim=-1)
        scale = self.temperature()
        # what no term uses still takes part, so that all ranks reduce the same gradients
        total = scale.sum() * 0
        if len(micro.positions) == 0:
            return total + queries_bd.sum() * 0, {}
        losses = self._losses(queries_bd, scale, micro, keys)
        weights = {str(name): weight for name, weight in self.config.weights.items()}
        for name, loss_b in losses.items():
            total = total + weights[name] * loss_b.sum()
        measured = {f"loss/{name}": loss_b.detach().sum() for name, loss_b in losses.items()}
        positive = (queries_bd.detach() * micro.teacher.to(queries_bd.dtype)).sum()
        measured |= {"similarity/positive": positive, "temperature": scale.detach().sum() * len(queries_bd)}
        if self.measuring:
            hardest_b = hardest_negatives(
                queries_bd, keys.vectors, micro.positions, micro.hashes, keys.hashes, tile=self.config.tile
            )
            measured["similarity/hardest_negative"] = hardest_b.sum()
        return total, measured

    def _losses(self, queries_bd: Tensor, scale: Tensor, micro: MicroBatch, keys: Keys) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        weights, tile = self.config.weights, self.config.tile
        if weights.get("ckd"):
            ids = {"query_ids": micro.hashes, "key_ids": keys.hashes}
            losses["ckd"] = ckd_losses(queries_bd, keys.vectors, micro.positions, scale=scale, tile=tile, **ids)
        if weights.get("congen"):
            losses["congen"] = congen_losses(
                queries_bd,
                keys.vectors,
                micro.teacher,
                student_temperature=self.config.student_temperature,
                teacher_temperature=self.config.teacher_temperature,
                tile=tile,
            )
        if weights.get("cosine"):
            losses["cosine"] = cosine_losses(queries_bd, micro.teacher)
        return losses


def build_projection(width: int, teacher_dim: int, config: CkdConfig) -> nn.Linear | None:
    """P: Linear(d_s -> d_t) with bias, or None. Raises ValueError if widths and config do not fit."""
    if config.projection_width not in (None, teacher_dim):
        raise ValueError(
            f"ckd.projection_width {config.projection_width} is not the teacher's width {teacher_dim}: leave it out"
        )
    if config.projection == "none" and width != teacher_dim:
        raise ValueError(f"ckd.projection is none, but the student is {width} wide and the teacher {teacher_dim}; use auto")
    if config.projection == "none" or (config.projection == "auto" and width == teacher_dim):
        return None
    return nn.Linear(width, teacher_dim)


class CkdRecipe:
    """Keys of the global batch gathered over ranks once a step, then the queue, which is pushed when the step is taken."""

    def __init__(self, task: CkdTask, batches: ShardBatches, device: torch.device) -> None:
        self.task = task
        self.student = task.student
        self.num_micro = batches.num_micro
        self.steps_per_epoch = batches.order.steps_per_epoch
        self.load = batches
        self.queue = KeyQueue(task.config.queue, batches.reader.dim, device)

    def restore(self, step: int) -> None:
        """The queue holds what was pushed before `step`, read from the shards again."""
        keys, ids = self.load.keys_before(step, self.queue.capacity)
        self.queue.restore(keys, ids, pushed=step * self.load.order.global_batch)

    def share(self, step: int, micro: list[MicroBatch]) -> Keys:
        """The keys of the step, the same on every rank; two collectives."""
        total = self.load.order.global_batch
        vectors = gather_dealt_rows(torch.cat([part.teacher for part in micro]), total)
        hashes = gather_dealt_rows(torch.cat([part.hashes for part in micro]), total)
        self._newest = vectors, hashes
        if len(self.queue) == 0:
            return Keys(vectors, hashes)
        return Keys(torch.cat([vectors, self.queue.keys]), torch.cat([hashes, self.queue.ids]))

    def taken(self) -> None:
        self.queue.push(*self._newest)
