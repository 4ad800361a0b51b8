"""Supervised contrast against its definition."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from distill.objectives.hpd import hpd_losses
from distill.objectives.simcse import same_text, simcse_losses


def test_loss_equals_its_definition():
    draw = torch.Generator().manual_seed(0)
    anchors, positives, negatives = (normalize(torch.randn(6, 8, generator=draw, dtype=torch.float64), dim=1) for _ in range(3))
    candidates, mask = torch.cat([positives, negatives]), torch.zeros(6, 12, dtype=torch.bool)
    mask[2, 7] = True
    losses = simcse_losses(anchors, candidates, torch.arange(6), scale=torch.tensor([20.0]), mask=mask)
    for row in range(6):
        exponents = torch.exp(20 * (anchors[row] @ candidates.T)) * ~mask[row]
        assert torch.isclose(losses[row], -torch.log(exponents[row] / exponents.sum()))


def test_the_same_text_is_no_negative_but_own_positive_and_negative_stay():
    own = torch.tensor([[1, 2, 3], [4, 5, 1]])
    mask = same_text(own, own, torch.tensor([0, 1]))
    # candidates: positives 2, 5, then negatives 3, 1; the anchor 1 is the other row's hard negative
    assert mask.tolist() == [[False, False, False, True], [False, False, False, False]]


def test_a_repeated_sentence_is_no_negative_of_its_other_self():
    own = torch.tensor([[1, 1], [2, 2], [1, 1]])
    assert same_text(own, own, torch.arange(3)).tolist() == [[False, False, True], [False] * 3, [True, False, False]]


def test_hpd_loss_is_the_mean_over_elements():
    vectors, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert hpd_losses(vectors, targets).tolist() == [2.5]
