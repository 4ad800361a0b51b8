"""Mined triplets against their definition by brute force; the same seed mines the same."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_config
from engines import embed_text

from distill.run.sampling import permutation
from distill.run.stopping import Stopped
from distill.shards import ShardReader
from distill.training.tasks.finetune import FinetuneConfig, load_triplets, mine_triplets


@pytest.fixture(scope="module")
def reader(tmp_path_factory, tiny_encoder):
    config = embed_text(write_config(tmp_path_factory.mktemp("run"), tiny_encoder))
    return ShardReader(config.parent / "runs/tiny/shards")


def finetune(**options):
    defaults = {"positive_range": (0.5, 0.999), "negative_rank": 20, "global_batch": 8, "num_mined": 1000, "mining_pool": 400}
    return FinetuneConfig(**defaults | options)


def mine(reader, path, seed=0, **options):
    *_, count = mine_triplets(reader, finetune(**options), seed, path)
    triplets = np.load(path, allow_pickle=False)
    assert triplets.shape == (count, 3) and triplets.dtype == np.int64
    return triplets


def test_positive_is_the_nearest_neighbour_and_negative_the_one_at_negative_rank(reader, tmp_path):
    triplets = mine(reader, tmp_path / "t.npy")
    pool = permutation(len(reader), 0, 0)[:400]
    vectors = reader.vectors(pool).astype(np.float64)
    cosines = vectors @ vectors.T
    place = {row: index for index, row in enumerate(pool.tolist())}
    expected = []
    for anchor, row in enumerate(pool.tolist()):
        neighbours = sorted((cosines[anchor, other] for other in range(len(pool)) if other != anchor), reverse=True)
        if 0.5 <= neighbours[0] <= 0.999:
            expected.append((row, neighbours[0], neighbours[19]))
    assert [row for row, _, _ in expected] == triplets[:, 0].tolist() and len(expected) > 100
    for (anchor, positive, negative), (_, nearest, twentieth) in zip(triplets.tolist(), expected, strict=True):
        assert abs(cosines[place[anchor], place[positive]] - nearest) < 1e-6
        assert abs(cosines[place[anchor], place[negative]] - twentieth) < 1e-6
        assert len({anchor, positive, negative}) == 3


def test_the_same_seed_mines_the_same_bytes_and_another_one_others(reader, tmp_path):
    mine(reader, tmp_path / "a.npy"), mine(reader, tmp_path / "b.npy"), mine(reader, tmp_path / "c.npy", seed=1)
    a, b, c = ((tmp_path / f"{name}.npy").read_bytes() for name in "abc")
    assert a == b != c


def test_num_mined_keeps_the_first_triplets(reader, tmp_path):
    everything = mine(reader, tmp_path / "all.npy")
    assert np.array_equal(mine(reader, tmp_path / "some.npy", num_mined=50), everything[:50])


def test_positives_stay_in_their_range(reader, tmp_path):
    triplets = mine(reader, tmp_path / "t.npy", positive_range=(0.9, 0.99))
    cosines = (reader.vectors(triplets[:, 0]).astype(np.float64) * reader.vectors(triplets[:, 1])).sum(axis=1)
    assert cosines.min() >= 0.9 - 1e-6 and cosines.max() <= 0.99 + 1e-6


def test_too_few_triplets_or_texts_are_refused_and_nothing_is_written(reader, tmp_path):
    with pytest.raises(ValueError, match=r"mining found \d+ triplets .* less than one global batch of 8: widen"):
        mine(reader, tmp_path / "t.npy", positive_range=(0.1, 0.11))
    with pytest.raises(ValueError, match=r"finetune\.negative_rank 20 needs more than 21 texts"):
        mine(reader, tmp_path / "t.npy", mining_pool=21)
    assert not list(tmp_path.iterdir())


def test_a_stop_is_checked_after_every_block_and_nothing_is_written(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.training.tasks.finetune.ANCHORS_PER_BLOCK", 100)
    checks = iter([None, None, Stopped("stopped on request")])

    def check_stop() -> None:
        if (stopped := next(checks)) is not None:
            raise stopped

    with pytest.raises(Stopped):
        load_triplets(finetune(), reader, tmp_path, 0, check_stop)
    assert not list(tmp_path.iterdir())
