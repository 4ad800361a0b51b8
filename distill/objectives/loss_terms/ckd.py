"""ckd: InfoNCE whose positive is the teacher's vector of the same text, among all keys (DistilCSE, arXiv 2112.05638)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.objectives.ckd import ckd_loss
from distill.objectives.loss_terms.base import Attention, KeyQuery, KeyTerm, TermInputs


class Ckd(KeyTerm):
    """-log softmax_k(a q_i.k)[own key], a = exp(logit_scale). Other keys of the same text, or with a
    teacher cosine of at least `same_meaning` to the row's, are masked."""

    name = "ckd"
    masks_same_text = True

    def queries(self, inputs: TermInputs) -> list[KeyQuery]:
        return [KeyQuery(inputs.queries.detach(), inputs.scale.detach())]

    def losses(self, inputs: TermInputs, attentions: Sequence[Attention]) -> Tensor:
        rows = torch.arange(len(inputs.queries), device=inputs.queries.device)
        return ckd_loss(inputs.queries, inputs.own_keys, rows, scale=inputs.scale, attention=attentions[0], reduction="none")

    def reference_query(self, inputs: TermInputs) -> KeyQuery:
        return KeyQuery(inputs.own_keys.float(), inputs.scale.detach().float())

    def reference_losses(self, inputs: TermInputs, query: KeyQuery, attention: Attention) -> Tensor:
        """No bound: a student may step away from negatives that the teacher keeps near, and go below it."""
        return attention.lse - query.scale * (query.vectors * query.vectors).sum(dim=1)
