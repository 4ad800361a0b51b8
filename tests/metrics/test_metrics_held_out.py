"""Dev and test texts are apart where there are enough of them."""

from __future__ import annotations

import pytest

from distill.metrics import held_out


@pytest.mark.parametrize(
    "num_held_out, test, dev", [(3000, 2000, 1000), (5000, 2000, 1000), (2500, 2000, 1000), (40, 100, 1000), (8, 4, 3)]
)
def test_dev_and_test_are_apart_where_there_are_enough(num_held_out, test, dev):
    for_test, for_dev = held_out.final_rows(num_held_out, test, dev), held_out.dev_rows(num_held_out, dev)
    assert len(for_dev) == min(dev, num_held_out // 2) and len(for_test) == min(test, num_held_out - len(for_dev))
    assert not set(for_test.tolist()) & set(for_dev.tolist())
    assert max(for_dev) == num_held_out - 1


@pytest.mark.parametrize("num_held_out", [0, 5, held_out.SMALLEST_DEV, 2 * held_out.SMALLEST_DEV - 1])
def test_too_small_a_held_out_set_serves_both(num_held_out):
    for_test, for_dev = held_out.final_rows(num_held_out, 100, 50), held_out.dev_rows(num_held_out, 50)
    assert for_test.tolist() == for_dev.tolist() == list(range(num_held_out))
