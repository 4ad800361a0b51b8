"""The fine-tuning stage: supervised contrast on (anchor, positive, hard negative) triplets, gathered over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import FinetuneConfig
from distill.corpus import text_hash
from distill.objectives.ckd import cosine_losses
from distill.objectives.triplets import triplet_losses
from distill.sampling import CHUNK_ROWS, GlobalOrder, dealt_order
from distill.student import Student
from distill.training.batches import MicroBatch, Tokenize, Tokens
from distill.training.ckd import Temperature
from distill.training.distributed import gather_dealt_rows, gather_with_gradient, rank, world_size
from distill.training.recipe import Task


@dataclass(frozen=True)
class Triplets:
    """n triplets of sentences; vectors [n, d_t] fp16: the anchors' teacher vectors, where they are known (else d_t = 0)."""

    sentences: Sequence[tuple[str, str, str]]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.sentences)


class FinetuneTask(Task):
    """L = sum_i [ contrast_i + w (1 - h_i.t_i) ] over this rank's anchors; micro.tokens holds anchors, positives, negatives."""

    def __init__(self, student: Student, projection: nn.Linear | None, config: FinetuneConfig, amp: torch.dtype | None) -> None:
        super().__init__()
        self.student = student
        self.projection = projection
        self.temperature = Temperature(config.temperature)
        self.config = config
        self.amp = amp

    def forward(self, micro: MicroBatch, shared: None) -> tuple[Tensor, dict[str, Tensor]]:
        vectors_bd = self.embed(micro)
        anchors_bd, positives_bd, negatives_bd = nn.functional.normalize(vectors_bd, dim=-1).chunk(3)
        total_rows = self.config.global_batch
        hashes_g3 = gather_dealt_rows(micro.hashes, total_rows)
        candidates_gd = gather_with_gradient(torch.cat([positives_bd, negatives_bd], dim=1), total_rows)
        width = anchors_bd.shape[1]
        scale = self.temperature()
        loss_b = triplet_losses(
            anchors_bd,
            candidates_gd[:, :width],
            candidates_gd[:, width:],
            micro.positions,
            scale=scale,
            mask=same_text(micro.hashes, hashes_g3, micro.positions),
        )
        total = loss_b.sum()
        measured = {
            "loss/contrast": loss_b.detach().sum(),
            "similarity/positive": (anchors_bd * positives_bd).detach().sum(),
            "similarity/hard_negative": (anchors_bd * negatives_bd).detach().sum(),
        }
        if self.config.teacher_weight:
            projected = vectors_bd.chunk(3)[0] if self.projection is None else self.projection(vectors_bd.chunk(3)[0])
            cosine_b = cosine_losses(nn.functional.normalize(projected, dim=-1), micro.teacher)
            total = total + self.config.teacher_weight * cosine_b.sum()
            measured["loss/teacher"] = cosine_b.detach().sum()
        return total, measured


def same_text(own_b3: Tensor, all_g3: Tensor, positions_b: Tensor) -> Tensor:
    """[B, 2G] bool: candidates (positives, then negatives) that are the anchor's or its positive's very text.

    own_b3, all_g3: text hashes of anchor, positive, negative. A row's own positive and own hard negative stay.
    """
    candidates = torch.cat([all_g3[:, 1], all_g3[:, 2]])
    mask = (candidates == own_b3[:, :1]) | (candidates == own_b3[:, 1:2])
    rows = torch.arange(len(own_b3), device=mask.device)
    mask[rows, positions_b] = False
    mask[rows, positions_b + len(all_g3)] = False
    return mask


class FinetuneRecipe:
    """One micro-batch a rank, since every anchor is held against the candidates of all."""

    num_micro = 1

    def __init__(
        self, task: FinetuneTask, triplets: Triplets, tokenize: Tokenize, *, seed: int, rank: int, world_size: int
    ) -> None:
        self.task = task
        self.student = task.student
        self.triplets = triplets
        self.tokenize = tokenize
        self.seed = seed
        self.order = GlobalOrder(np.array([len(triplets)]), global_batch=task.config.global_batch, seed=seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._part = np.arange(rank, task.config.global_batch, world_size)
        self._lengths = np.array([sum(len(sentence) for sentence in triplet) for triplet in triplets.sentences])

    def load(self, step: int) -> list[MicroBatch]:
        rows = self.order.batch(step)
        rows = rows[dealt_order(self._lengths[rows])][self._part]
        chosen = [self.triplets.sentences[row] for row in rows]
        columns = [[triplet[column] for triplet in chosen] for column in range(3)]
        hashes = torch.tensor([[text_hash(sentence) for sentence in triplet] for triplet in chosen])
        tokens = [chunk for column in columns for chunk in self._chunks(column)]
        most = -(-self.order.global_batch // world_size())
        return [MicroBatch(tokens, torch.from_numpy(self._part), torch.from_numpy(self.triplets.vectors[rows]), hashes, most)]

    def _chunks(self, sentences: list[str]) -> list[Tokens]:
        """Triplets are dealt by their length in all, so neighbours are alike enough. Every rank makes as many chunks."""
        smallest_share = self.order.global_batch // world_size()
        cuts = np.array_split(np.arange(len(sentences)), max(1, smallest_share // CHUNK_ROWS))
        return [self.tokenize([sentences[row] for row in rows]) for rows in cuts]

    def restore(self, step: int) -> None:
        pass

    def share(self, step: int, micro: list[MicroBatch]) -> None:
        """Dropout depends on (seed, step, rank) alone, so that a resumed run draws what it would have drawn."""
        torch.manual_seed(hash((self.seed, step, rank())) % 2**63)

    def taken(self) -> None:
        pass
