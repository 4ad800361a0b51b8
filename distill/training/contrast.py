"""The stages in which students are held against each other: fine-tuning on triplets, and SimCSE on sentences alone.

A row has V views, each a sentence: (anchor, positive, hard negative) or (sentence, sentence), the second under another
dropout mask. Anchors of all ranks are held against the other views of all ranks, and gradients reach all of them.

one micro-batch      views are gathered inside forward; backward adds up what all ranks' anchors ask of this rank's views
several              gradients are cached (Gao et al. 2021): views are embedded without gradient, gathered, and the loss's
                     gradient is taken at them, a micro-batch of anchors at a time; then each micro-batch is embedded again,
                     with the same dropout, and its part of that gradient flows into the student. The same step exactly, in
                     the memory of one micro-batch, at the price of a second forward pass.

Beside it `teacher_weight` holds as many sentences of the shards a step to the teacher's vectors, so that the student does not
forget what no label speaks of:  L = contrast + w mean_i (1 - P(s_i).t_i)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import ContrastConfig
from distill.corpus import text_hash
from distill.objectives.ckd import cosine_losses
from distill.objectives.simcse import same_text, simcse_losses
from distill.sampling import GlobalOrder, dealt_order, seed_of
from distill.shards import ShardReader
from distill.student import Student
from distill.student.student import Tokens
from distill.training.batches import PLACEHOLDER, MicroBatch
from distill.training.ckd import Temperature
from distill.training.distributed import add_over_ranks, gather_dealt_rows, gather_with_gradient, rank, world_size
from distill.training.floors import contrast_floor
from distill.training.recipe import Task
from distill.training.rows import Rows

VIEW_ROWS = 32  # the most of a chunk, in one forward pass: views are of like length only as far as their rows are


@dataclass(frozen=True)
class Cached:
    """What the first pass leaves for a micro-batch's second: views [V, b, d], gradient of the step's loss at them, and the
    micro-batch's own part of that loss and of its gradient in the scale."""

    gradients: Tensor
    loss: Tensor
    scale_gradient: Tensor
    seed: int


class ContrastTask(Task):
    """The sum over this rank's rows of their losses. micro.tokens: the views one after the other, then the replayed rows.

    components [d, d_t], where the student is a compact one: the teacher's vectors in its space; projection: the student's in
    the teacher's.
    """

    def __init__(
        self,
        student: Student,
        config: ContrastConfig,
        amp: torch.dtype | None,
        *,
        num_views: int,
        projection: nn.Linear | None = None,
        components: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.projection = projection
        self.components = components
        self.temperature = Temperature(config.temperature)
        self.config = config
        self.amp = amp
        self.num_views = num_views

    def forward(self, micro: MicroBatch, cached: deque[Cached] | None) -> tuple[Tensor, dict[str, Tensor]]:
        part = cached.popleft() if cached else None
        if part is not None:
            torch.manual_seed(part.seed)
        views, replayed = self.split(self.embed(micro), len(micro.positions))
        scale = self.temperature()
        if part is None:
            total = self._contrast_of_all_ranks(views, micro, scale)
        else:
            # its gradient is the cached one, its value the loss's
            total = (views * part.gradients).sum() + (scale * part.scale_gradient).sum()
            total = total - total.detach() + part.loss
        measured = {
            "loss/contrast": total.detach(),
            "similarity/positive": (views[0] * views[1]).detach().sum(),
            "temperature": scale.detach().sum() * views.shape[1],
        }
        if self.num_views > 2:
            measured["similarity/hard_negative"] = (views[0] * views[2]).detach().sum()
        if self.config.teacher_weight:
            forgotten_b = self._distance_to_teacher(replayed, micro.teacher)
            total = total + self.config.teacher_weight * forgotten_b.sum()
            measured["loss/teacher"] = forgotten_b.detach().sum()
        return total, measured

    def split(self, vectors: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Normalised views [V, rows, d] and replayed rows as they are; an empty micro-batch has one row of tokens a view."""
        held = max(rows, 1)
        views = nn.functional.normalize(vectors[: self.num_views * held], dim=-1).view(self.num_views, held, -1)
        return views[:, :rows], vectors[self.num_views * held :][:rows]

    def contrast(self, anchors: Tensor, candidates: Tensor, micro: MicroBatch, hashes_gv: Tensor, scale: Tensor) -> Tensor:
        """The summed loss of a micro-batch's anchors [b, d] against candidates [(V-1) G, d]."""
        mask = same_text(micro.hashes, hashes_gv, micro.positions)
        if self.measuring:
            self._measure(anchors.detach(), candidates.detach(), micro.positions, mask)
        return simcse_losses(anchors, candidates, micro.positions, scale=scale, mask=mask).sum()

    @torch.no_grad()
    def _measure(self, anchors: Tensor, candidates: Tensor, positions: Tensor, mask: Tensor) -> None:
        cosines_bn = anchors @ candidates.T
        rows = torch.arange(len(anchors), device=anchors.device)
        positive_b = cosines_bn[rows, positions]
        cosines_bn.masked_fill_(mask, -torch.inf)[rows, positions] = -torch.inf
        self.observe(
            {
                "similarity/positive": positive_b,
                "similarity/hardest_negative": cosines_bn.amax(dim=1),
                "negatives/masked": mask.sum(dim=1) / (len(candidates) - 1),
            }
        )

    def _contrast_of_all_ranks(self, views: Tensor, micro: MicroBatch, scale: Tensor) -> Tensor:
        total_rows = self.config.global_batch
        hashes_gv = gather_dealt_rows(micro.hashes, total_rows)
        gathered = gather_with_gradient(views[1:].transpose(0, 1), total_rows)  # [G, V-1, d]
        return self.contrast(views[0], gathered.transpose(0, 1).flatten(0, 1), micro, hashes_gv, scale)

    def _distance_to_teacher(self, vectors: Tensor, teacher: Tensor) -> Tensor:
        projected = vectors if self.projection is None else self.projection(vectors)
        if self.components is not None:
            teacher = nn.functional.normalize(teacher.float() @ self.components.T.to(teacher.device), dim=-1)
        return cosine_losses(nn.functional.normalize(projected, dim=-1), teacher)


class ContrastRecipe:
    """Rows of a step in dealt order, longest first; rank r takes every W-th. `replay`: shards, where the teacher is heard."""

    def __init__(
        self, task: ContrastTask, rows: Rows, replay: ShardReader | None, *, seed: int, view_rows: int = VIEW_ROWS
    ) -> None:
        self.task = task
        self.view_rows = view_rows
        self.student = task.student
        self.rows = rows
        self.replay = replay
        self.seed = seed
        total = task.config.global_batch
        self.order = GlobalOrder(rows.shard_rows, global_batch=total, seed=seed)
        self.replay_order = GlobalOrder(replay.shard_rows, global_batch=total, seed=seed) if replay else None
        self.steps_per_epoch = self.order.steps_per_epoch
        largest_share = -(-total // world_size())
        self.num_micro = -(-largest_share // task.config.micro_batch)
        shares = np.array_split(np.arange(largest_share), self.num_micro)
        self._most_rows = [len(share) for share in shares]
        dealt = [share * world_size() + rank() for share in shares]
        self._positions = [positions[positions < total] for positions in dealt]

    def load(self, step: int) -> list[MicroBatch]:
        rows = self.order.batch(step)
        rows = rows[dealt_order(self.rows.lengths(rows))]
        replayed = np.zeros(len(rows), dtype=np.int64)
        if self.replay is not None and self.replay_order is not None:
            replayed = self.replay_order.batch(step)
            replayed = replayed[dealt_order(self.replay.lengths(replayed))]
        return [
            self._micro_batch(positions, rows[positions], replayed[positions], most)
            for positions, most in zip(self._positions, self._most_rows, strict=True)
        ]

    def _micro_batch(self, positions: np.ndarray, rows: np.ndarray, replayed: np.ndarray, most: int) -> MicroBatch:
        views = self.rows.views(rows)
        tokens = [chunk for view in views for chunk in self._chunks(view, most)]
        teacher = np.zeros((len(rows), 0), dtype=np.float16)
        if self.replay is not None:
            tokens += self._chunks(self.replay.texts(replayed), most)
            teacher = self.replay.vectors(replayed)
        hashes = np.array([[text_hash(text) for text in view] for view in views], dtype=np.int64).T
        return MicroBatch(tokens, torch.from_numpy(positions), torch.from_numpy(teacher), torch.from_numpy(hashes.copy()), most)

    def _chunks(self, sentences: list[str], most: int) -> list[Tokens]:
        """Neighbours in dealt order are of like length. Every rank makes as many chunks, none of them empty."""
        sentences = sentences or [PLACEHOLDER]
        starts = np.linspace(0, len(sentences), max(1, (most - 1) // self.view_rows) + 1).astype(int)
        return [self.student.tokenize(sentences[start:stop]) for start, stop in pairwise(starts)]

    def restore(self, step: int) -> None:
        pass

    def share(self, step: int, micro: list[MicroBatch]) -> deque[Cached] | None:
        """Dropout depends on (seed, step, rank, micro-batch) alone: a resumed run draws what it would have drawn, and the
        second pass of cached gradients what the first one drew."""
        seeds = [seed_of(self.seed, step, rank(), number) for number in range(len(micro))]
        if len(micro) == 1:
            torch.manual_seed(seeds[0])
            return None
        return cache_gradients(self.task, micro, seeds)

    def taken(self) -> None:
        pass

    def floor(self, means: dict[str, float]) -> dict[str, float]:
        num_candidates = (self.task.num_views - 1) * self.task.config.global_batch
        return {"floor": contrast_floor(means["temperature"], num_candidates)}

    def state(self, step: int) -> dict[str, float]:
        return {}


def cache_gradients(task: ContrastTask, micro: list[MicroBatch], seeds: list[int]) -> deque[Cached]:
    """The first pass of a step with several micro-batches; a collective, with the same calls on every rank."""
    total_rows = task.config.global_batch
    kept: list[Tensor] = []
    with torch.no_grad():
        for part, seed in zip(micro, seeds, strict=True):
            torch.manual_seed(seed)
            kept.append(task.split(task.embed(part), len(part.positions))[0])
        scale = task.temperature().detach().requires_grad_()
    dealt = torch.cat([part.positions for part in micro]).argsort()
    views = torch.cat(kept, dim=1).transpose(0, 1)[dealt]  # [b of all micro-batches, V, d]
    hashes_gv = gather_dealt_rows(torch.cat([part.hashes for part in micro])[dealt], total_rows)
    gathered = gather_dealt_rows(views[:, 1:].contiguous(), total_rows)  # [G, V-1, d]
    candidates = gathered.transpose(0, 1).flatten(0, 1).requires_grad_()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, of_part in zip(micro, kept, strict=True):
        anchors = of_part[0].clone().requires_grad_()
        loss = task.contrast(anchors, candidates, part, hashes_gv, scale)
        asked = torch.autograd.grad(loss, [anchors, scale, candidates])
        candidates.grad = asked[2] if candidates.grad is None else candidates.grad.add_(asked[2])
        found.append((asked[0], loss.detach(), asked[1]))
    assert candidates.grad is not None
    asked_of_all = add_over_ranks(candidates.grad).view(task.num_views - 1, total_rows, -1)
    return deque(
        Cached(torch.cat([anchors[None], asked_of_all[:, part.positions]]), loss, of_scale, seed)
        for part, (anchors, loss, of_scale), seed in zip(micro, found, seeds, strict=True)
    )
