"""Supervised contrast against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from distill.objectives.in_batch_contrast import contrast_losses, reference_loss, same_text


def test_loss_equals_its_definition():
    draw = torch.Generator().manual_seed(0)
    anchors, positives, negatives = (normalize(torch.randn(6, 8, generator=draw, dtype=torch.float64), dim=1) for _ in range(3))
    candidates, mask = torch.cat([positives, negatives]), torch.zeros(6, 12, dtype=torch.bool)
    mask[2, 7] = True
    losses = contrast_losses(anchors, candidates, torch.arange(6), scale=torch.tensor([20.0]), mask=mask)
    for row in range(6):
        exponents = torch.exp(20 * (anchors[row] @ candidates.T)) * ~mask[row]
        assert torch.isclose(losses[row], -torch.log(exponents[row] / exponents.sum()))


def test_the_same_text_is_no_negative_but_own_positive_and_negative_stay():
    own = torch.tensor([[1, 2, 3], [4, 5, 1]])
    mask = same_text(own, own, torch.tensor([0, 1]))
    # candidates: positives 2, 5, then negatives 3, 1; the anchor 1 is the other row's hard negative
    assert mask.tolist() == [[False, False, False, True], [False, False, False, False]]


def test_a_repeated_text_is_no_negative_of_its_copy():
    own = torch.tensor([[1, 1], [2, 2], [1, 1]])
    assert same_text(own, own, torch.arange(3)).tolist() == [[False, False, True], [False] * 3, [True, False, False]]


def test_the_reference_loss_is_that_of_a_positive_at_1_and_negatives_at_minus_1():
    assert reference_loss(20.0, 128) == pytest.approx(0, abs=1e-12)
    cosines = -torch.ones(1, 8)
    cosines[0, 0] = 1
    assert reference_loss(1.5, 8) == pytest.approx(
        float(cross_entropy(1.5 * cosines, torch.zeros(1, dtype=torch.long))), rel=1e-5
    )
