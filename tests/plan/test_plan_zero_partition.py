"""ZeRO's partitions, where no real step is needed to know them."""

from __future__ import annotations

import random

import pytest

from distill.plan.shapes import Parameter
from distill.plan.zero_partition import gradient_partition_sizes, padded


@pytest.mark.parametrize("ranks", [2, 7, 64, 500])
def test_a_rank_holds_the_gradients_of_all_tensors_that_reach_into_its_partition(ranks):
    draw = random.Random(ranks)
    for _ in range(30):
        sizes = [(draw.choice((1, 30, 700, 9000)), group) for group in (0, 1, 2) for _ in range(draw.randint(1, 9))]
        parameters = [Parameter(size, True, group) for size, group in sizes]
        expected = [0] * ranks
        for group in (0, 1, 2):
            numels = [numel for numel, other in sizes if other == group]
            part = padded(sum(numels), 2 * ranks) // ranks
            for index, numel in enumerate(numels):
                begin = sum(numels[:index])
                for rank in range(begin // part, (begin + numel - 1) // part + 1):
                    expected[rank] += numel
        assert gradient_partition_sizes(parameters, ranks).tolist() == expected
