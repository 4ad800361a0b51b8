"""8 bits with a scale for each block or row are the nearest there are, and coarsen nothing outside of it."""

from __future__ import annotations

import numpy as np
import pytest

from distill.export.int8 import BLOCK, in_blocks, in_rows


@pytest.mark.parametrize("rows", [BLOCK, 3 * BLOCK, 40, 7])
def test_a_weight_in_blocks_is_the_nearest_with_a_scale_for_each_block(rows):
    weight = np.random.default_rng(rows).standard_normal((rows, 5)).astype(np.float32)
    weight[:, 2] = 0
    weight[0, 3] = 100  # coarsens its own block alone
    blocks, scales = in_blocks(weight)
    num_blocks = -(-rows // BLOCK)
    assert blocks.shape == (5, num_blocks, BLOCK) and blocks.dtype == np.uint8
    assert scales.shape == (5, num_blocks) and scales.dtype == np.float32
    found = ((blocks.astype(np.float32) - 128) * scales[:, :, None]).reshape(5, -1).T
    assert np.all(found[rows:] == 0)
    largest = np.abs(np.pad(weight, ((0, -rows % BLOCK), (0, 0)))).T.reshape(5, num_blocks, BLOCK).max(axis=2)
    steps = np.repeat(largest / 127, BLOCK, axis=1).T[:rows]
    assert np.all(np.abs(found[:rows] - weight) <= steps / 2 + 1e-6)


def test_a_row_keeps_its_largest_and_a_row_of_zeros_stays_one():
    rows = np.array([[0, 0, 0], [1, -3, 2], [1e-6, 0, 0]], dtype=np.float32)
    integers, scales = in_rows(rows)
    assert integers.dtype == np.int8 and integers.tolist() == [[0, 0, 0], [42, -127, 85], [127, 0, 0]]
    assert np.allclose(integers * scales, rows, atol=0.02) and np.isfinite(scales).all()
