"""The softmax over keys in tiles, in parts and with masks, against the same over all pairs at once."""

from __future__ import annotations

import pytest
import torch
from key_problems import BATCH, problem

from distill.objectives.key_softmax import attend, joined, survey_negatives


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
