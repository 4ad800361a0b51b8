"""Loss terms against their definitions."""

from __future__ import annotations

import torch
from key_problems import problem
from torch.nn.functional import normalize

from distill.objectives.loss_terms.congen import shuffled_targets
from distill.objectives.loss_terms.cosine import cosine_losses
from distill.objectives.loss_terms.mse import mse_losses
from distill.objectives.loss_terms.pca import pca_losses


def test_cosine_loss_is_half_the_squared_distance():
    queries, keys, positives, *_ = problem(torch.float64, queue=False, ids=False, masked=False)
    teacher = keys[positives]
    assert torch.allclose(cosine_losses(queries, teacher), mse_losses(queries, teacher) / 2)
    assert torch.allclose(mse_losses(3 * queries, teacher), 9 + 1 - 6 * (queries * teacher).sum(dim=1))


def test_pca_loss_is_the_mean_over_elements():
    vectors, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert pca_losses(vectors, targets).tolist() == [2.5]


def test_shuffling_keeps_the_probability_of_every_group_and_depends_on_the_seed_alone():
    draw = torch.Generator().manual_seed(0)
    keys = torch.eye(60)
    teacher = normalize(torch.rand(4, 60, generator=draw), dim=1)
    plain = torch.softmax(teacher @ keys.T / 0.05, dim=1)
    shuffled = shuffled_targets(teacher, keys, [1, 2, 3, 4], teacher_temperature=0.05)
    for weights, before in zip(shuffled, plain, strict=True):
        falling, order = before.sort(descending=True)
        group = ((falling.cumsum(0) - falling) * 10).floor().clamp(max=9)
        assert not torch.equal(weights, before)
        for number in group.unique():
            members = order[group == number]
            assert torch.equal(weights[members].sort().values, before[members].sort().values)
    again = shuffled_targets(teacher[2:3], keys, [3], teacher_temperature=0.05)
    assert torch.allclose(again[0], shuffled[2])
    assert not torch.equal(shuffled_targets(teacher[2:3], keys, [5], teacher_temperature=0.05), again)
