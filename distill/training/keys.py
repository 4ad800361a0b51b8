"""The keys of one step: those of the global batch, and the queue, replicated on every rank or sharded over them.

Where the queue is sharded, every rank computes the softmax of all ranks' queries over its own part and sends back a log-sum-exp
and a vector for each query (`objectives.key_softmax.joined`). Backward communicates nothing: keys are constants, and what was
sent back is all that the gradient is made of. A micro-batch of b rows sends b d_t numbers to every rank and gets as many back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.objectives.key_softmax import attend, joined, survey_negatives
from distill.objectives.queue import KeyQueue
from distill.run.collectives import add_over_ranks, exchange, gather, world_size
from distill.training.batches import MicroBatch


@dataclass(frozen=True)
class Keys:
    """What every micro-batch of a step sees.

    vectors [G, d_t] fp16, hashes [G] int64: of the global batch, in length-sorted order. queue: all of it, or this rank's part.
    """

    vectors: Tensor
    hashes: Tensor
    queue: KeyQueue
    sharded: bool

    def attend(
        self,
        queries: Tensor,
        scales: Tensor,
        micro: MicroBatch,
        *,
        tile: int,
        num_masked: int,
        same_meaning: float | None,
    ) -> tuple[Tensor, Tensor]:
        """The softmax of `objectives.key_softmax.attend` over batch and queue: lse [k, b], attended [k, b, d_t].

        queries [k, b, d_t]: k query sets of the micro-batch's b rows; scales [k]. In the first `num_masked` sets, keys of the
        row's text are masked, and those of a teacher cosine >= same_meaning. A collective where the queue is sharded.
        """
        num_sets, rows, width = queries.shape
        flat, scale = queries.reshape(-1, width), scales.repeat_interleave(rows)

        def masked(key_ids: Tensor) -> dict[str, Any]:
            if not num_masked:
                return {}
            alike = {"teacher": micro.teacher.repeat(num_masked, 1), "same_meaning": same_meaning}
            return {"query_ids": micro.hashes.repeat(num_masked), "key_ids": key_ids, **alike}

        own: dict[str, Any] = {"positives": micro.positions.repeat(num_masked)} if num_masked else {}
        parts = [attend(flat, self.vectors, scale, tile=tile, **masked(self.hashes), **own)]
        if self.sharded:
            parts += self._over_ranks(queries, scales, micro, tile, num_masked, same_meaning)
        elif len(self.queue):
            parts.append(attend(flat, self.queue.keys, scale, tile=tile, **masked(self.queue.ids)))
        lse, attended = parts[0]
        if len(parts) > 1:
            lse, attended = joined(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
        return lse.view(num_sets, rows), attended.view(num_sets, rows, width)

    def _over_ranks(
        self, queries: Tensor, scales: Tensor, micro: MicroBatch, tile: int, num_masked: int, same_meaning: float | None
    ) -> list[tuple[Tensor, Tensor]]:
        """For each rank's part of the queue, its (lse, attended) of this rank's queries."""
        num_sets, rows, width = queries.shape
        size, most = world_size(), micro.most_rows
        gathered = gather(_padded(queries.transpose(0, 1), most))  # [W, most, k, d]
        everyone = gathered.permute(2, 0, 1, 3).reshape(-1, width)  # the first set of all ranks first, as masks need it
        masked: dict[str, Any] = {}
        if num_masked:
            hashes = gather(_padded(micro.hashes, most)).flatten().repeat(num_masked)
            masked = {"query_ids": hashes, "key_ids": self.queue.ids}
            if same_meaning is not None:
                teacher = gather(_padded(micro.teacher, most)).flatten(0, 1).repeat(num_masked, 1)
                masked |= {"teacher": teacher, "same_meaning": same_meaning}
        scale = scales.repeat_interleave(size * most)
        lse, attended = attend(everyone, self.queue.keys, scale, tile=tile, **masked)
        answers = torch.cat([lse[:, None], attended], dim=1).view(num_sets, size, most, width + 1).transpose(0, 1).contiguous()
        mine = exchange(answers)[:, :, :rows].reshape(size, num_sets * rows, width + 1)
        return [(part[:, 0], part[:, 1:]) for part in mine]

    def negatives(self, queries: Tensor, micro: MicroBatch, *, tile: int, same_meaning: float | None) -> tuple[Tensor, Tensor]:
        """Of each row's keys, in the batch and in the whole queue: the largest cosine to one of another text, [b] float32, and
        the fraction that is masked, [b] float32. A collective where the queue is sharded."""
        none = torch.full_like(micro.positions, -1)
        options: dict[str, Any] = {"tile": tile, "same_meaning": same_meaning}
        teacher, queue = micro.teacher, self.queue
        parts = [
            survey_negatives(queries, self.vectors, micro.positions, micro.hashes, self.hashes, teacher=teacher, **options)
        ]
        num_queued = len(queue)
        if self.sharded:
            most = micro.most_rows
            everyone, hashes, teacher = (gather(_padded(rows, most)).flatten(0, 1) for rows in (queries, micro.hashes, teacher))
            found = survey_negatives(
                everyone, queue.keys, none.new_full((len(hashes),), -1), hashes, queue.ids, teacher=teacher, **options
            )
            answers = exchange(torch.stack(found, dim=1).float().view(world_size(), most, 2))[:, : len(queries)]
            parts += [(part[:, 0], part[:, 1]) for part in answers]
            num_queued = int(add_over_ranks(torch.tensor(num_queued, device=queries.device)))
        elif num_queued:
            parts.append(survey_negatives(queries, queue.keys, none, micro.hashes, queue.ids, teacher=teacher, **options))
        hardest, masked = (torch.stack([part[number] for part in parts]) for number in range(2))
        num_keys = len(self.vectors) + num_queued - 1  # without the row's own
        return hardest.amax(dim=0), masked.sum(dim=0) / max(num_keys, 1)


def _padded(rows: Tensor, count: int) -> Tensor:
    """[count, ...]: zeros after the rows there are."""
    return nn.functional.pad(rows, (0,) * (2 * rows.ndim - 1) + (count - len(rows),))
