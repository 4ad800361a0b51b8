"""ckd_loss against the untiled definition in float64, value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from distill.objectives.ckd import ckd_loss, cosine_losses, mse_losses, shuffled_targets
from distill.objectives.contrast import attend, joined, survey_negatives

BATCH, QUEUE, WIDTH = 37, 101, 24


def reference(queries, keys, positives, logit_scale, query_ids, key_ids, mask):
    """-mean log softmax, holding B x N, in float64."""
    logits = logit_scale.exp() * queries @ keys.T
    excluded = torch.zeros_like(logits, dtype=torch.bool) if mask is None else mask.clone()
    if query_ids is not None:
        excluded |= query_ids[:, None] == key_ids[None]
    excluded[torch.arange(len(queries)), positives] = False
    return cross_entropy(logits.masked_fill(excluded, -torch.inf), positives)


def problem(dtype, *, queue: bool, ids: bool, masked: bool, scale: float = 3.0):
    draw = torch.Generator().manual_seed(1)
    num_keys = BATCH + QUEUE * queue
    queries = normalize(torch.randn(BATCH, WIDTH, generator=draw, dtype=torch.float64), dim=1)
    keys = normalize(torch.randn(num_keys, WIDTH, generator=draw, dtype=torch.float64), dim=1)
    positives = torch.randperm(BATCH, generator=draw)
    key_ids = torch.randint(-5, 40, (num_keys,), generator=draw) if ids else None
    query_ids = key_ids[positives] if key_ids is not None else None
    mask = torch.rand(BATCH, num_keys, generator=draw) < 0.3 if masked else None
    return (queries.to(dtype), keys.to(dtype), positives, torch.tensor([scale], dtype=dtype), query_ids, key_ids, mask)


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


def test_cosine_loss_is_half_the_squared_distance():
    queries, keys, positives, *_ = problem(torch.float64, queue=False, ids=False, masked=False)
    teacher = keys[positives]
    assert torch.allclose(cosine_losses(queries, teacher), mse_losses(queries, teacher) / 2)
    assert torch.allclose(mse_losses(3 * queries, teacher), 9 + 1 - 6 * (queries * teacher).sum(dim=1))


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


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 20), (0, 5)])
def test_parts_of_the_keys_join_to_the_whole(cuts):
    queries, keys, _, logit_scale, *_ = problem(torch.float64, queue=True, ids=False, masked=False)
    expected = attend(queries, keys, logit_scale.exp())
    parts = [attend(queries, part, logit_scale.exp(), tile=4) for part in torch.tensor_split(keys, cuts)]
    found = joined(torch.stack([lse for lse, _ in parts]), torch.stack([attended for _, attended in parts]))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_row_may_have_a_scale_of_its_own_and_masks_may_speak_of_the_first_rows_alone():
    queries, keys, positives, logit_scale, query_ids, key_ids, _ = problem(torch.float64, queue=True, ids=True, masked=False)
    masks = {"positives": positives, "query_ids": query_ids, "key_ids": key_ids}
    masked = attend(queries, keys, logit_scale.exp(), tile=5, **masks)
    plain = attend(queries, keys, torch.tensor([7.0]), tile=5)
    scales = torch.cat([logit_scale.exp().expand(BATCH), torch.full((BATCH,), 7.0)])
    both = attend(torch.cat([queries, queries]), keys, scales, tile=5, **masks)
    assert torch.allclose(both[0], torch.cat([masked[0], plain[0]])) and torch.allclose(
        both[1], torch.cat([masked[1], plain[1]])
    )


def test_a_row_that_sees_no_key_has_no_weight():
    lse, attended = attend(torch.ones(2, 3), torch.ones(0, 3), torch.ones(1))
    assert lse.tolist() == [-torch.inf] * 2 and not attended.any()
    whole, vector = joined(torch.stack([lse, lse]), torch.stack([attended, attended]))
    assert whole.tolist() == [-torch.inf] * 2 and not vector.any()


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


@pytest.mark.parametrize("same_meaning", [None, 0.3])
@pytest.mark.parametrize("tile", [None, 7])
def test_the_hardest_negatives_and_the_count_of_masked_ones_are_those_of_all_pairs(tile, same_meaning):
    queries, keys, positives, _, query_ids, key_ids, _ = problem(torch.float32, queue=True, ids=True, masked=False)
    teacher = keys[positives]
    meaning = {} if same_meaning is None else {"teacher": teacher, "same_meaning": same_meaning}
    hardest, masked = survey_negatives(queries, keys, positives, query_ids, key_ids, tile=tile, **meaning)
    own = torch.zeros(BATCH, len(keys), dtype=torch.bool)
    own[torch.arange(BATCH), positives] = True
    same_text = (query_ids[:, None] == key_ids[None]) & ~own
    expected = (queries @ keys.T).masked_fill(same_text | own, -torch.inf).amax(dim=1)
    assert torch.allclose(hardest, expected, atol=1e-6)
    alike = (teacher @ keys.T >= same_meaning) & ~own if same_meaning is not None else torch.zeros_like(own)
    assert masked.tolist() == (same_text | alike).sum(dim=1).tolist()
    assert masked.sum() > 0
