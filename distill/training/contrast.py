"""Tasks that compare the student's vectors with each other: fine-tuning on triplets, and SimCSE on texts alone.

A row has V views, each a text: (anchor, positive, hard negative) or (text, text), the second under another dropout mask.
Anchors of all ranks are compared with the other views of all ranks, and gradients reach all of them.

one micro-batch      views are gathered inside forward; backward sums the gradients of all ranks' anchors at this rank's views
several              gradients are cached (Gao et al. 2021): views are embedded without gradient, gathered, and the gradient of
                     the loss is taken at them, a micro-batch of anchors at a time; then each micro-batch is embedded again,
                     with the same dropout, and its part of that gradient flows into the student. The same step exactly, in
                     the memory of one micro-batch, at the price of a second forward pass.

`teacher_weight` adds as many texts of the shards a step, which are kept near the teacher's vectors, so that the student does
not forget what no label covers:  L = contrast + w mean_i (1 - P(s_i).t_i)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from distill.objectives.in_batch_contrast import contrast_losses, reference_loss, same_text
from distill.objectives.loss_terms.cosine import cosine_losses
from distill.run.collectives import add_over_ranks, gather_rows, gather_with_gradient, rank, world_size
from distill.run.config import result
from distill.run.prompts import Role
from distill.run.sampling import CHUNK_ROWS_ON_GPU, GlobalOrder, SampleSource, length_order, seed_of
from distill.shards import ShardReader
from distill.student import Student
from distill.student.encoder import set_dropout
from distill.student.student import Tokens, load_projection
from distill.training.batches import PLACEHOLDER, MicroBatch, gather_in_order, report_order
from distill.training.samples import Samples
from distill.training.task import StepContext, Task, Temperature, TrainingModule
from distill.training.train_config import TemperatureConfig, TrainConfig
from distill.training.training_stage import Setup, TrainingStage

VIEW_ROWS = 32  # of a chunk, in one forward pass: views are of similar length only as far as their rows are


class Rows(Protocol):
    """Numbered rows of V views each. shard_rows: how many lie together on disk; mixture: their sources, where those have
    weights; source_names: of all sources, where there are several."""

    num_views: int
    mixture: Sequence[SampleSource]
    source_names: Sequence[str]

    @property
    def shard_rows(self) -> np.ndarray: ...

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """A length of each row, [n] int64, by which rows are sorted before they are assigned to ranks."""
        ...

    def views(self, rows: np.ndarray) -> list[list[str]]:
        """The texts of the rows: V lists of n, the first of them the anchors."""
        ...

    def hashes(self, rows: np.ndarray) -> np.ndarray:
        """What identifies them, int64 [n, V]: texts of one hash are no negatives of each other."""
        ...

    def roles(self, rows: np.ndarray) -> list[list[Role | None]]:
        """The roles of these texts, each None where they have none."""
        ...

    def sources(self, rows: np.ndarray) -> Tensor | None:
        """The number of each row's source, [n] int64; None where there are not several."""
        ...


class ContrastConfig(TrainConfig):
    """Tasks that compare the student's vectors with each other, over all ranks.

    Where micro_batch is less than a rank's rows of global_batch, gradients are cached: the same step in less memory.
    """

    # dropout masks depend on it
    micro_batch: int = result(64, gt=0, description="as in the section ckd")
    temperature: TemperatureConfig = result(TemperatureConfig(scale=20.0, learnable=False), description="tau is 1 / scale")
    teacher_weight: float = result(
        0.0, ge=0, description="weight of 1 - cosine to the teacher, on as many texts of the shards per step: forgets less"
    )
    dropout: float | None = result(None, ge=0, lt=1, description="null keeps the encoder's own")


@dataclass(frozen=True)
class Cached:
    """What the first pass leaves for a micro-batch's second: the gradient of the step's loss at its views [V, b, d], and the
    micro-batch's own part of that loss and of its gradient in the scale."""

    gradients: Tensor
    loss: Tensor
    scale_gradient: Tensor
    seed: int


@dataclass(frozen=True)
class TeacherMap:
    """How a student's vectors are compared with the teacher's.

    projection: the student's vectors into the teacher's space; components [d, d_t]: the teacher's into a compact student's
    space; neither: as they are.
    """

    projection: nn.Linear | None = None
    components: Tensor | None = None


class ContrastModule(TrainingModule):
    """The sum over this rank's rows of their losses. micro.tokens: the views one after the other, then the shards' texts."""

    def __init__(
        self,
        student: Student,
        config: ContrastConfig,
        amp: torch.dtype | None,
        *,
        num_views: int,
        to_teacher: TeacherMap | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.projection = to_teacher.projection if to_teacher else None
        self.components = to_teacher.components if to_teacher else None
        self.temperature = Temperature(config.temperature)
        self.config = config
        self.amp = amp
        self.num_views = num_views

    def forward(self, micro: MicroBatch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        part: Cached | None = context.first_pass[micro.index] if context.first_pass else None
        if part is not None:
            torch.manual_seed(part.seed)
        views, replayed = self.split(self.embed(micro), len(micro.positions))
        scale = self.temperature()
        if part is None:
            total = self._contrast_of_all_ranks(views, micro, scale, context)
        else:
            # its gradient is the cached one, its value the loss's
            total = (views * part.gradients).sum() + (scale * part.scale_gradient).sum()
            total = total - total.detach() + part.loss
        logged = {
            "loss/contrast": total.detach(),
            "similarity/positive": (views[0] * views[1]).detach().sum(),
            "temperature": scale.detach().sum() * views.shape[1],
        }
        if self.num_views > 2:
            logged["similarity/hard_negative"] = (views[0] * views[2]).detach().sum()
        if self.config.teacher_weight:
            distance_b = self._distance_to_teacher(replayed, micro.teacher)
            total = total + self.config.teacher_weight * distance_b.sum()
            logged["loss/teacher"] = distance_b.detach().sum()
        return total, logged

    def split(self, vectors: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Normalised views [V, rows, d], and the shards' texts as they are. An empty micro-batch has a row of tokens a view."""
        held = max(rows, 1)
        views = nn.functional.normalize(vectors[: self.num_views * held], dim=-1).view(self.num_views, held, -1)
        return views[:, :rows], vectors[self.num_views * held :][:rows]

    def contrast(
        self, anchors: Tensor, candidates: Tensor, micro: MicroBatch, hashes_gv: Tensor, scale: Tensor, context: StepContext
    ) -> Tensor:
        """The summed loss of a micro-batch's anchors [b, d] against candidates [(V-1) G, d]."""
        mask = same_text(micro.hashes, hashes_gv, micro.positions)
        losses_b = contrast_losses(anchors, candidates, micro.positions, scale=scale, mask=mask)
        if context.is_logged:
            self._observe(anchors.detach(), candidates.detach(), micro.positions, mask, context)
            context.observe_sources(micro.sources, losses_b)
        return losses_b.sum()

    @torch.no_grad()
    def _observe(self, anchors: Tensor, candidates: Tensor, positions: Tensor, mask: Tensor, context: StepContext) -> None:
        cosines_bn = anchors @ candidates.T
        rows = torch.arange(len(anchors), device=anchors.device)
        positive_b = cosines_bn[rows, positions]
        cosines_bn.masked_fill_(mask, -torch.inf)[rows, positions] = -torch.inf
        context.observe(
            {
                "similarity/positive": positive_b,
                "similarity/hardest_negative": cosines_bn.amax(dim=1),
                "negatives/masked": mask.sum(dim=1) / (len(candidates) - 1),
            }
        )

    def _contrast_of_all_ranks(self, views: Tensor, micro: MicroBatch, scale: Tensor, context: StepContext) -> Tensor:
        total_rows = self.config.global_batch
        hashes_gv = gather_rows(micro.hashes, total_rows)
        gathered = gather_with_gradient(views[1:].transpose(0, 1), total_rows)  # [G, V-1, d]
        return self.contrast(views[0], gathered.transpose(0, 1).flatten(0, 1), micro, hashes_gv, scale, context)

    def _distance_to_teacher(self, vectors: Tensor, teacher: Tensor) -> Tensor:
        projected = vectors if self.projection is None else self.projection(vectors)
        if self.components is not None:
            teacher = nn.functional.normalize(teacher.float() @ self.components.T.to(teacher.device), dim=-1)
        return cosine_losses(nn.functional.normalize(projected, dim=-1), teacher)

    def first_pass(self, micro: list[MicroBatch], seeds: list[int], context: StepContext) -> list[Cached]:
        """The first pass of a step with several micro-batches; a collective, with the same calls on every rank."""
        total_rows = self.config.global_batch
        kept: list[Tensor] = []
        with torch.no_grad():
            for part, seed in zip(micro, seeds, strict=True):
                torch.manual_seed(seed)
                kept.append(self.split(self.embed(part), len(part.positions))[0])
            scale = self.temperature().detach().requires_grad_()
        hashes_gv = gather_in_order(micro, [part.hashes for part in micro], total_rows)
        gathered = gather_in_order(micro, [views[1:].transpose(0, 1) for views in kept], total_rows)  # [G, V-1, d]
        candidates = gathered.transpose(0, 1).flatten(0, 1).requires_grad_()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, of_part in zip(micro, kept, strict=True):
            anchors = of_part[0].clone().requires_grad_()
            loss = self.contrast(anchors, candidates, part, hashes_gv, scale, context)
            at_anchors, at_scale, at_candidates = torch.autograd.grad(loss, [anchors, scale, candidates])
            candidates.grad = at_candidates if candidates.grad is None else candidates.grad.add_(at_candidates)
            found.append((at_anchors, loss.detach(), at_scale))
        assert candidates.grad is not None
        over_ranks = add_over_ranks(candidates.grad).view(self.num_views - 1, total_rows, -1)
        return [
            Cached(torch.cat([anchors[None], over_ranks[:, part.positions]]), loss, of_scale, seed)
            for part, (anchors, loss, of_scale), seed in zip(micro, found, seeds, strict=True)
        ]


class ContrastTask(Task):
    """Rows of a step in length-sorted order, longest first; rank r takes every W-th. replay: shards, with `teacher_weight`;
    replay_mixture: their sources, where those have weights."""

    def __init__(
        self,
        module: ContrastModule,
        rows: Rows,
        replay: ShardReader | None,
        *,
        seed: int,
        dropout: float = 0.0,
        view_rows: int = VIEW_ROWS,
        replay_mixture: Sequence[SampleSource] = (),
    ) -> None:
        self.module: ContrastModule = module
        self.dropout = dropout
        self.depends_on_ranks = dropout > 0
        self.view_rows = view_rows
        self.rows = rows
        self.replay = None if replay is None else Samples(replay)
        self.seed = seed
        total = module.config.global_batch
        self.order = GlobalOrder(rows.shard_rows, global_batch=total, seed=seed, sources=rows.mixture)
        report_order(self.order)
        self.replay_order = None
        if replay is not None:
            self.replay_order = GlobalOrder(replay.shard_rows, global_batch=total, seed=seed, sources=replay_mixture)
        self.steps_per_epoch = self.order.steps_per_epoch
        most_rows = -(-total // world_size())
        self.num_micro = -(-most_rows // module.config.micro_batch)
        parts = np.array_split(np.arange(most_rows), self.num_micro)
        self._most_rows = [len(part) for part in parts]
        positions = [part * world_size() + rank() for part in parts]
        self._positions = [each[each < total] for each in positions]

    def load(self, step: int) -> list[MicroBatch]:
        rows = self.order.batch(step)
        rows = rows[length_order(self.rows.lengths(rows))]
        replayed = np.zeros(len(rows), dtype=np.int64)
        if self.replay is not None and self.replay_order is not None:
            replayed = self.replay_order.batch(step)
            replayed = replayed[length_order(self.replay.lengths(replayed))]
        return [
            self._micro_batch(index, positions, rows[positions], replayed[positions])
            for index, positions in enumerate(self._positions)
        ]

    def _micro_batch(self, index: int, positions: np.ndarray, rows: np.ndarray, replayed: np.ndarray) -> MicroBatch:
        most = self._most_rows[index]
        views = self.rows.views(rows)
        pairs = zip(views, self.rows.roles(rows), strict=True)
        tokens = [chunk for view, roles in pairs for chunk in self._chunks(view, roles, most)]
        teacher = np.zeros((len(rows), 0), dtype=np.float16)
        if self.replay is not None:
            tokens += self._chunks(self.replay.texts(replayed), self.replay.roles(replayed), most)
            teacher = self.replay.vectors(replayed)
        rows_of = torch.from_numpy(positions), torch.from_numpy(teacher), torch.from_numpy(self.rows.hashes(rows))
        return MicroBatch(tokens, *rows_of, most, index, self.rows.sources(rows))

    def _chunks(self, texts: list[str], roles: list[Role | None], most: int) -> list[Tokens]:
        """Neighbours are of similar length. Every rank makes as many chunks, none of them empty."""
        if not texts:
            texts, roles = [PLACEHOLDER], [None]
        starts = np.linspace(0, len(texts), max(1, (most - 1) // self.view_rows) + 1).astype(int)
        return [self.module.student.tokenize(texts[start:stop], roles[start:stop]) for start, stop in pairwise(starts)]

    def prepare_step(self, step: int, micro: list[MicroBatch], *, is_logged: bool) -> StepContext:
        """Dropout depends on (seed, step, rank, micro-batch) alone: a resumed run has the masks that it would have had, and the
        second pass of cached gradients those of the first."""
        context = StepContext(step, is_logged, source_names=self.rows.source_names)
        seeds = [seed_of(self.seed, step, rank(), part.index) for part in micro]
        if len(micro) == 1:
            torch.manual_seed(seeds[0])
        else:
            context.first_pass = self.module.first_pass(micro, seeds, context)
        return context

    def reference_losses(self, means: dict[str, float]) -> dict[str, float]:
        num_candidates = (self.module.num_views - 1) * self.module.config.global_batch
        return {"reference_loss": reference_loss(means["temperature"], num_candidates)}


def build_contrast_task(stage: TrainingStage, config: ContrastConfig, rows: Rows, setup: Setup) -> ContrastTask:
    """The task of a stage over these rows, with dropout and the teacher's vectors as its config asks."""
    student = setup.student
    dropout = own_dropout(student.encoder.config) if config.dropout is None else config.dropout
    set_dropout(student.encoder, dropout)
    to_teacher = teacher_map(stage, student, setup.reader) if config.teacher_weight else None
    module = ContrastModule(student, config, setup.amp, num_views=rows.num_views, to_teacher=to_teacher)
    replay = setup.reader if config.teacher_weight else None
    view_rows = VIEW_ROWS if setup.device.type == "cpu" else CHUNK_ROWS_ON_GPU
    return ContrastTask(
        module,
        rows,
        replay,
        seed=setup.seed,
        dropout=dropout,
        view_rows=view_rows,
        replay_mixture=setup.mixture,
    )


def own_dropout(config: PretrainedConfig) -> float:
    """The dropout that an encoder's own config names: between layers, or, where it has none there, the largest elsewhere."""
    named = [getattr(config, name, None) for name in ("hidden_dropout_prob", "dropout_rate", "dropout")]
    elsewhere = ("attention_dropout", "embedding_dropout", "mlp_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    others = [float(getattr(config, name, None) or 0.0) for name in elsewhere]
    return next((float(value) for value in named if value is not None), max(others))


def check_contrast(stage: TrainingStage, config: ContrastConfig, width: int | None, teacher_dim: int | None) -> None:
    """Raises ValueError if `teacher_weight` compares the encoder's vectors with the teacher's and nothing maps between them."""
    if config.teacher_weight and stage.init == "student" and width is not None and teacher_dim not in (None, width):
        raise ValueError(
            f"{stage.name}.teacher_weight: the student is {width} wide, the teacher {teacher_dim}, and no projection between"
            f" them is trained before: begin with the student of ckd ({stage.name}.init=ckd), or leave it at 0"
        )


def teacher_map(stage: TrainingStage, student: Student, reader: ShardReader) -> TeacherMap:
    """How the initial student of a stage compares with the teacher. Raises ValueError where nothing maps between them."""
    if student.head is not None:
        return TeacherMap(components=torch.from_numpy(reader.moments.pca(student.dim)[0]).float())
    projection = load_projection(stage.context.run_dir / stage.init / "student")
    if projection is None and student.dim != reader.dim:
        raise ValueError(
            f"teacher_weight: the student is {student.dim} wide, the teacher {reader.dim}, and no projection between them was"
            " trained: begin with the student of ckd (init: ckd), or leave teacher_weight at 0"
        )
    return TeacherMap(projection=projection)
