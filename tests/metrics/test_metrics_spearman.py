import time

import numpy as np
import pytest
from scipy.stats import spearmanr

from distill.metrics.spearman import bootstrap_spearman, spearman, spearman_rows


def sample(num_values: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.integers(num_values, size=200).astype(float)
    return x, x + rng.integers(num_values, size=200)


@pytest.mark.parametrize("num_values", [3, 1000])
def test_spearman_is_scipys_with_and_without_ties(num_values):
    x, y = sample(num_values)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert spearman_rows(np.stack([x, y]), np.stack([y, -y])) == pytest.approx([spearman(x, y), -1])


@pytest.mark.parametrize("num_values", [3, 1000])
def test_each_resample_scores_as_if_it_were_ranked_again(num_values):
    x, y = sample(num_values)
    fast = bootstrap_spearman(x, y, 20, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    slow = [spearmanr(x[rows], y[rows]).statistic for rows in (rng.integers(200, size=200) for _ in range(20))]
    assert fast == pytest.approx(slow, abs=1e-12)


def test_resamples_take_less_time_than_ranking_each_of_them():
    x, y = np.random.default_rng(0).standard_normal((2, 5000)).round(3)
    start = time.process_time()
    bootstrap_spearman(x, y, 100, np.random.default_rng(0))
    fast = time.process_time() - start
    rng = np.random.default_rng(0)
    start = time.process_time()
    for _ in range(100):
        rows = rng.integers(len(x), size=len(x))
        spearman(x[rows], y[rows])
    assert fast < time.process_time() - start


def test_a_constant_side_orders_nothing():
    assert spearman(np.ones(5), np.arange(5.0)) == 0
    assert (bootstrap_spearman(np.ones(5), np.arange(5.0), 3, np.random.default_rng(0)) == 0).all()
