"""ckd_loss against the untiled definition in float64, value and gradients."""

from __future__ import annotations

import pytest
import torch
from key_problems import BATCH, problem
from torch.nn.functional import cross_entropy

from distill.objectives.ckd import ckd_loss


def reference(queries, keys, positives, logit_scale, query_ids, key_ids, mask):
    """-mean log softmax, holding B x N, in float64."""
    logits = logit_scale.exp() * queries @ keys.T
    excluded = torch.zeros_like(logits, dtype=torch.bool) if mask is None else mask.clone()
    if query_ids is not None:
        excluded |= query_ids[:, None] == key_ids[None]
    excluded[torch.arange(len(queries)), positives] = False
    return cross_entropy(logits.masked_fill(excluded, -torch.inf), positives)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", [None, 1, 16, 1000])
def test_value_and_gradients_equal_the_untiled_reference(dtype, tolerance, queue, ids, masked, tile):
    queries, keys, positives, logit_scale, query_ids, key_ids, mask = problem(dtype, queue=queue, ids=ids, masked=masked)
    queries.requires_grad_()
    logit_scale.requires_grad_()
    loss = ckd_loss(
        queries, keys, positives, scale=logit_scale.exp(), tile=tile, query_ids=query_ids, key_ids=key_ids, mask=mask
    )
    exact_queries = queries.detach().double().requires_grad_()
    exact_scale = logit_scale.detach().double().requires_grad_()
    expected = reference(exact_queries, keys.double(), positives, exact_scale, query_ids, key_ids, mask)
    gradients = torch.autograd.grad(loss, (queries, logit_scale))
    expected_gradients = torch.autograd.grad(expected, (exact_queries, exact_scale))
    for found, wanted in zip((loss, *gradients), (expected, *expected_gradients), strict=True):
        assert (found.double() - wanted).abs().max() <= tolerance


def test_every_key_masked_but_the_positive_gives_zero_loss():
    queries, keys, positives, logit_scale, *_ = problem(torch.float64, queue=True, ids=False, masked=False)
    everything = torch.ones(BATCH, len(keys), dtype=torch.bool)
    loss = ckd_loss(queries, keys, positives, scale=logit_scale.exp(), tile=7, mask=everything)
    assert loss.abs() < 1e-12


def test_a_large_scale_does_not_overflow():
    queries, keys, positives, _, *_ = problem(torch.float32, queue=True, ids=False, masked=False)
    loss = ckd_loss(queries, keys, positives, scale=torch.tensor([1e4]), tile=16)
    expected = reference(queries.double(), keys.double(), positives, torch.tensor([1e4]).double().log(), None, None, None)
    assert torch.isfinite(loss) and abs(loss.item() / expected.item() - 1) < 1e-5


def test_bf16_inputs_are_accumulated_in_fp32():
    queries, keys, positives, logit_scale, *_ = problem(torch.float32, queue=True, ids=False, masked=False)
    halves = queries.bfloat16(), keys.bfloat16()
    loss = ckd_loss(*halves, positives, scale=logit_scale.exp(), tile=16)
    expected = reference(halves[0].double(), halves[1].double(), positives, logit_scale.double(), None, None, None)
    assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < 2e-5


def test_keys_get_no_gradient():
    queries, keys, positives, logit_scale, *_ = problem(torch.float64, queue=True, ids=False, masked=False)
    keys.requires_grad_()
    queries.requires_grad_()
    ckd_loss(queries, keys, positives, scale=logit_scale.exp()).backward()
    assert keys.grad is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": torch.zeros(5, 3)}, "must be"),
        ({"positives": torch.zeros(3, dtype=torch.int64)}, "one key index"),
        ({"query_ids": torch.zeros(BATCH, dtype=torch.int64)}, "come together"),
        ({"mask": torch.zeros(2, 2, dtype=torch.bool)}, "mask"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    queries, keys, positives, logit_scale, *_ = problem(torch.float32, queue=False, ids=False, masked=False)
    arguments = {"queries": queries, "keys": keys, "positives": positives, "scale": logit_scale.exp()} | change
    with pytest.raises(ValueError, match=message):
        ckd_loss(**arguments)


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("ids", [False, True])
def test_keys_of_the_same_meaning_are_no_negatives(tile, ids):
    queries, keys, positives, logit_scale, query_ids, key_ids, _ = problem(torch.float64, queue=True, ids=ids, masked=False)
    alike = keys[positives] @ keys.T >= 0.3
    assert 0.05 < alike.double().mean() < 0.5
    found = ckd_loss(
        queries, keys, positives, scale=logit_scale.exp(), tile=tile, query_ids=query_ids, key_ids=key_ids, same_meaning=0.3
    )
    expected = reference(queries, keys, positives, logit_scale, query_ids, key_ids, alike)
    assert abs(found - expected) < 1e-12
