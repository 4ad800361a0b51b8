"""ZeRO's partitions, where no real step is needed to know them."""

from __future__ import annotations

import random

import pytest

from distill.plan.shapes import Parameter
from distill.plan.zero_partition import gradient_partition_size


@pytest.mark.parametrize("ranks", [2, 7, 64, 500])
def test_the_rank_that_holds_most_gradients_is_found_without_computing_all(ranks):
    draw = random.Random(ranks)
    for _ in range(30):
        sizes = [(draw.choice((1, 30, 700, 9000)), group) for group in (0, 1, 2) for _ in range(draw.randint(1, 9))]
        parameters = [Parameter(size, True, group) for size, group in sizes]
        of_all = [gradient_partition_size(parameters, ranks, rank) for rank in range(ranks)]
        assert gradient_partition_size(parameters, ranks, None) == max(of_all)
