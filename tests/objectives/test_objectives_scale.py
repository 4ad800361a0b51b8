"""The scale of ckd's contrast follows from how close together the teacher's vectors lie."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distill.objectives.ckd import ckd_loss
from distill.objectives.scale import LOWEST_SCALE, SMALL_LOSS, fitting_scale

NUM_KEYS = 16_640


def teacher(mean_cosine: float, n: int = 1024, dim: int = 384) -> Tensor:
    """Random unit vectors around a common direction, so that their mean cosine is about `mean_cosine`; float32 [n, dim]."""
    torch.manual_seed(0)
    around = torch.randn(n, dim) / math.sqrt(dim)
    return nn.functional.normalize(around + math.sqrt(mean_cosine / (1 - mean_cosine)) * torch.eye(dim)[0], dim=-1)


def loss_of_a_copy(vectors: Tensor, scale: float) -> Tensor:
    """ckd's loss of each row of a student that equals the teacher, against these vectors; [n]."""
    rows = torch.arange(len(vectors))
    return ckd_loss(vectors.double(), vectors.double(), rows, scale=torch.tensor([scale]).double(), reduction="none")


@pytest.mark.parametrize("mean_cosine, expected", [(0.0, 20.0), (0.6, 45.0), (0.75, 70.0), (0.95, 100.0)])
def test_vectors_that_lie_closer_together_need_a_higher_scale(mean_cosine, expected):
    assert fitting_scale(teacher(mean_cosine), NUM_KEYS, 100.0) == expected


def test_a_copy_of_the_teacher_has_next_to_no_loss_at_it_and_more_below():
    vectors = teacher(0.6)
    scale = fitting_scale(vectors, len(vectors), 100.0)
    assert LOWEST_SCALE < scale < 100
    assert loss_of_a_copy(vectors, scale).median() <= SMALL_LOSS < loss_of_a_copy(vectors, scale - 5).median()


def test_at_it_the_contrast_does_not_move_a_copy_away():
    """The gradient at the teacher's own vectors is that of the loss of other vectors, near 0 where the copy has no loss."""

    def gradient(scale: float) -> float:
        vectors = teacher(0.6)
        student = vectors.clone().requires_grad_()
        rows = torch.arange(len(vectors))
        ckd_loss(nn.functional.normalize(student, dim=-1), vectors, rows, scale=torch.tensor([scale])).backward()
        return float(student.grad.norm())

    assert gradient(fitting_scale(teacher(0.6), 1024, 100.0)) < gradient(LOWEST_SCALE) / 50


def test_near_duplicates_do_not_raise_it():
    vectors = teacher(0.0)
    vectors[512:612] = nn.functional.normalize(vectors[:100] + 0.001 * torch.randn(100, 384), dim=-1)
    assert loss_of_a_copy(vectors, LOWEST_SCALE).mean() > 10 * SMALL_LOSS
    assert fitting_scale(vectors, NUM_KEYS, 100.0) == LOWEST_SCALE


def test_keys_that_are_no_negatives_do_not_count():
    vectors = teacher(0.75)
    assert fitting_scale(vectors, NUM_KEYS, 100.0, same_meaning=0.7) < fitting_scale(vectors, NUM_KEYS, 100.0)
    assert fitting_scale(vectors, NUM_KEYS, 100.0, same_meaning=0.5) == LOWEST_SCALE


@pytest.mark.parametrize("highest, expected", [(10.0, 10.0), (20.0, 20.0), (47.0, 47.0)])
def test_it_is_never_above_the_highest(highest, expected):
    assert fitting_scale(teacher(0.75), NUM_KEYS, highest) == expected


def test_one_vector_alone_has_the_lowest():
    assert fitting_scale(teacher(0.5, n=1), NUM_KEYS, 100.0) == LOWEST_SCALE
