"""congen: soft labels, the teacher's distribution over all keys (ConGen, EMNLP Findings 2022; shuffled: arXiv 2310.13499)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.objectives.key_softmax import cross_entropy
from distill.objectives.loss_terms.base import Attention, KeyQuery, KeyTerm, TermInputs

NUM_GROUPS = 10
SIMILARITIES_AT_ONCE = 1 << 22


class ConGen(KeyTerm):
    """CE( softmax(t_i.keys / tau_T), softmax(q_i.keys / tau_S) ). Options: student_temperature, teacher_temperature,
    group_shuffling."""

    name = "congen"

    def queries(self, inputs: TermInputs) -> list[KeyQuery]:
        students = KeyQuery(inputs.queries.detach(), self._scale(inputs, self.options.student_temperature))
        if self.options.group_shuffling:
            return [students]
        teachers = inputs.own_keys.to(inputs.queries.dtype)
        return [students, KeyQuery(teachers, self._scale(inputs, self.options.teacher_temperature))]

    def losses(self, inputs: TermInputs, attentions: Sequence[Attention]) -> Tensor:
        students = attentions[0]
        if self.options.group_shuffling:
            temperature = self.options.teacher_temperature
            targets = shuffled_targets(inputs.own_keys, inputs.all_keys(), inputs.row_seeds(), teacher_temperature=temperature)
        else:
            targets = attentions[1].attended
        scale = self._scale(inputs, self.options.student_temperature)
        return cross_entropy(inputs.queries, scale, students.lse, students.attended, targets)

    def reference_query(self, inputs: TermInputs) -> KeyQuery:
        return KeyQuery(inputs.own_keys.float(), self._scale(inputs, self.options.teacher_temperature))

    def reference_losses(self, inputs: TermInputs, query: KeyQuery, attention: Attention) -> Tensor:
        """The entropy of the labels, below which no student goes."""
        return attention.lse - query.scale * (query.vectors * attention.attended).sum(dim=1)

    @staticmethod
    def _scale(inputs: TermInputs, temperature: float) -> Tensor:
        return inputs.scale.new_tensor([1 / temperature])


@torch.no_grad()
def shuffled_targets(teacher: Tensor, keys: Tensor, seeds: list[int], *, teacher_temperature: float) -> Tensor:
    """ConGen's target of each row under Group-P shuffling (DistillCSE, arXiv 2310.13499), [B, d] float32.

    A row's probabilities softmax(t_i.keys / tau_T), in falling order, are cut into groups at every tenth of their sum, and
    shuffled inside each: the student learns which keys are near, and not the teacher's order among equals. seeds: one a row,
    which alone decides its shuffle. A few rows at a time, so that B x N is never held.
    """
    keys = keys.to(torch.float32)
    rows_at_once = max(1, SIMILARITIES_AT_ONCE // len(keys))
    targets_bd = keys.new_empty((len(teacher), keys.shape[1]))
    for start in range(0, len(teacher), rows_at_once):
        rows = slice(start, start + rows_at_once)
        weights_rn = torch.softmax(teacher[rows].to(torch.float32) @ keys.T / teacher_temperature, dim=1)
        falling_rn, order_rn = weights_rn.sort(dim=1, descending=True)
        group_rn = ((falling_rn.cumsum(dim=1) - falling_rn) * NUM_GROUPS).floor().clamp(0, NUM_GROUPS - 1)
        generators = [torch.Generator(keys.device).manual_seed(seed) for seed in seeds[rows]]
        noise_rn = torch.stack([torch.rand(len(keys), generator=each, device=keys.device) for each in generators])
        inside_rn = (group_rn + noise_rn).argsort(dim=1)
        weights_rn.scatter_(1, order_rn, falling_rn.gather(1, inside_rn))
        targets_bd[rows] = weights_rn @ keys
    return targets_bd
