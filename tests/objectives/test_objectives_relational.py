"""The relational loss: its minimum, its value for parts of a batch, its gradient."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from distill.objectives.loss_terms.relational import relational_losses, whitening_map

TEMPERATURES = {"student_temperature": 0.05, "teacher_temperature": 0.05}


def drawn(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_teachers_own_vectors_reach_the_reference_loss_rotated_or_scaled_and_others_do_not():
    teacher = normalize(drawn(12, 6), dim=1)
    rotated = 3 * teacher @ torch.linalg.qr(drawn(6, 6, seed=1))[0]
    rows = torch.arange(12)
    losses, references = relational_losses(rotated, teacher, rows, sizes=[6], **TEMPERATURES)
    torch.testing.assert_close(losses, references)
    others, same_references = relational_losses(drawn(12, 6, seed=2), teacher, rows, sizes=[6], **TEMPERATURES)
    assert bool((others > references + 1e-3).all()) and torch.equal(references, same_references)


def test_a_row_is_not_compared_with_itself():
    """With one other row there is nothing to tell apart, however unlike the two are."""
    losses, references = relational_losses(
        drawn(2, 4), normalize(drawn(2, 4, seed=1), dim=1), torch.arange(2), sizes=[4], **TEMPERATURES
    )
    torch.testing.assert_close(losses, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(references, torch.zeros(2, dtype=torch.float64))


def test_parts_of_a_batch_have_the_losses_that_they_have_in_the_whole():
    vectors, teacher = drawn(9, 6), normalize(drawn(9, 6, seed=1), dim=1)
    whole, _ = relational_losses(vectors, teacher, torch.arange(9), sizes=[6, 2], **TEMPERATURES)
    part, _ = relational_losses(vectors, teacher, torch.tensor([7, 2]), sizes=[6, 2], **TEMPERATURES)
    torch.testing.assert_close(part, whole[[7, 2]])
    none, _ = relational_losses(vectors, teacher, torch.tensor([], dtype=torch.int64), sizes=[6, 2], **TEMPERATURES)
    assert none.shape == (0,)


def test_gradients_reach_both_sides():
    teacher = normalize(drawn(5, 6, seed=1), dim=1)

    def loss(vectors: torch.Tensor) -> torch.Tensor:
        return relational_losses(vectors, teacher, torch.tensor([1, 3]), sizes=[4, 2], **TEMPERATURES)[0]

    vectors = drawn(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(loss, vectors)
    (gradient,) = torch.autograd.grad(loss(vectors).sum(), vectors)
    assert bool((gradient.norm(dim=1) > 0).all())


def test_whitening_makes_directions_alike_by_degrees():
    vectors = drawn(500, 4) * torch.tensor([5.0, 3.0, 1.0, 0.2]) @ torch.linalg.qr(drawn(4, 4, seed=1))[0] + 1
    rising, columns = torch.linalg.eigh(torch.cov(vectors.T))
    eigenvalues, components = rising.flip(0), columns.T.flip(0)
    for power in (0.0, 0.25, 1.0):
        whitened = vectors @ whitening_map(components, eigenvalues, power).T
        torch.testing.assert_close(torch.cov(whitened.T), torch.diag(eigenvalues ** (1 - power)))
    empty = torch.cat([eigenvalues[:3], torch.zeros(1, dtype=torch.float64)])
    assert bool((whitening_map(components, empty, 1.0)[3].norm() <= 1001 / eigenvalues[0].sqrt()).all())
