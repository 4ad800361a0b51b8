from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from shard_sets import DIM, flip, make_set, make_texts, text_hashes, unit_vectors

from distill.shards import ShardError, ShardReader
from distill.shards import reader as reader_module

SHARD_ROWS = (50, 50, 21)


def test_random_access_equals_a_plain_list(tmp_path: Path) -> None:
    make_set(tmp_path, SHARD_ROWS)
    reader = ShardReader(tmp_path)
    texts = [text for index, rows in enumerate(SHARD_ROWS) for text in make_texts(rows, index)]
    vectors = np.concatenate([unit_vectors(rows, DIM, index) for index, rows in enumerate(SHARD_ROWS)])
    hashes = np.concatenate([text_hashes(rows) + index for index, rows in enumerate(SHARD_ROWS)])
    wanted = np.random.default_rng(0).integers(0, 121, 500)

    assert len(reader) == 121 and reader.dim == DIM and reader.shard_rows.tolist() == list(SHARD_ROWS)
    assert reader.texts(wanted) == [texts[i] for i in wanted]
    assert np.array_equal(reader.vectors(wanted), vectors[wanted]) and reader.vectors(wanted).dtype == np.float16
    assert np.array_equal(reader.hashes(wanted), hashes[wanted])
    assert reader.lengths(wanted).tolist() == [len(texts[i].encode()) for i in wanted]
    for i in (0, 49, 50, 120, -1):
        text, vector = reader[i]
        assert text == texts[i] and np.array_equal(vector, vectors[i])
    assert [text for text, _ in reader] == texts


def test_no_indices_read_nothing_and_an_index_out_of_range_is_an_error(tmp_path: Path) -> None:
    make_set(tmp_path)
    reader = ShardReader(tmp_path)
    assert reader.texts([]) == [] and reader.vectors([]).shape == (0, DIM)
    for index in (121, -122):
        with pytest.raises(IndexError, match="0 to 120"):
            reader[index]


@pytest.mark.parametrize("dim", [1, 3, 384])
def test_any_width_can_be_read(tmp_path: Path, dim: int) -> None:
    from shard_sets import finish_set, write_one

    write_one(tmp_path, 0, 33, dim=dim)
    finish_set(tmp_path, 1)
    assert np.array_equal(ShardReader(tmp_path).vectors(np.arange(33)), unit_vectors(33, dim))


def test_more_shards_than_may_be_open_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path)
    wanted = np.random.default_rng(1).permutation(121)
    few, many = ShardReader(tmp_path), ShardReader(tmp_path)
    expected = many.texts(wanted)
    monkeypatch.setattr(reader_module, "MAX_OPEN", 1)
    for _ in range(2):
        assert few.texts(wanted) == expected
    assert len(few._open) == 1 and len(many._open) == 3


def test_a_reader_reaches_another_process(tmp_path: Path) -> None:
    make_set(tmp_path)
    reader = ShardReader(tmp_path)
    reader[0]
    assert pickle.loads(pickle.dumps(reader))[60][0] == reader[60][0]  # noqa: S301, as a data loader's worker gets it


def test_a_folder_without_a_manifest_is_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no finished shard set at .* \(no manifest.json\): run precompute"):
        ShardReader(tmp_path)


def test_a_damaged_shard_is_refused_when_first_touched_and_not_before(tmp_path: Path) -> None:
    make_set(tmp_path)
    flip(tmp_path / "000001.tar", 700)
    reader = ShardReader(tmp_path)
    assert reader[0][0] == make_texts(1)[0]
    with pytest.raises(ShardError, match=r"000001.tar: block 0, member embedding.npy: .*python -m distill.shards repair"):
        reader[50]


def test_moments_that_changed_are_refused(tmp_path: Path) -> None:
    make_set(tmp_path)
    flip(tmp_path / "moments.npz", 200)
    with pytest.raises(ShardError, match=r"moments.npz: missing, or not as it was written"):
        _ = ShardReader(tmp_path).moments
