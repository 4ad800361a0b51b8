from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shard_sets import finish_set, make_set, unit_vectors

from distill.shards import Moments, ShardReader


def test_moments_are_those_of_numpy() -> None:
    vectors = unit_vectors(9000, 24)
    moments = Moments.of(vectors)
    exact = vectors.astype(np.float64)
    assert moments.count == 9000
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False, bias=True), rtol=0, atol=1e-12)


def test_moments_merge_equals_moments_of_all(tmp_path: Path) -> None:
    make_set(tmp_path)
    reader = ShardReader(tmp_path)
    whole = Moments.of(reader.vectors(np.arange(len(reader))))
    merged = reader.moments
    assert (merged.count, merged.dim) == (121, 24)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-15)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=0, atol=1e-15)


def test_pca_of_merged_moments_equals_pca_of_all_vectors() -> None:
    scales = np.geomspace(1, 0.01, 24)
    vectors = [unit_vectors(2000, 24, seed) * scales for seed in range(3)]
    components, eigenvalues = Moments.merge(map(Moments.of, vectors)).pca(8)
    centred = np.concatenate(vectors) - np.concatenate(vectors).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(eigenvalues, singular[:8] ** 2 / len(centred), rtol=1e-9)
    np.testing.assert_allclose(components.T @ components, directions[:8].T @ directions[:8], rtol=0, atol=1e-9)
    assert components.shape == (8, 24)
    assert all(row[np.abs(row).argmax()] > 0 for row in components)


def test_saved_moments_come_back_exactly(tmp_path: Path) -> None:
    moments = Moments.of(unit_vectors(100, 7), source="ab")
    moments.save(tmp_path / "m.npz")
    again = Moments.load(tmp_path / "m.npz")
    assert (again.count, again.source) == (100, "ab")
    assert np.array_equal(again.total, moments.total) and np.array_equal(again.outer, moments.outer)


def test_a_pickle_in_a_sidecar_is_refused(tmp_path: Path) -> None:
    moments = {"count": np.array([{}], dtype=object), "total": np.zeros(2), "upper": np.zeros(3), "source": np.bytes_("")}
    np.savez(tmp_path / "m.npz", **moments)
    with pytest.raises(ValueError, match=r"m\.npz: no moments can be read from it"):
        Moments.load(tmp_path / "m.npz")


def test_moments_of_different_widths_do_not_merge() -> None:
    with pytest.raises(ValueError, match="widths 3 and 4"):
        Moments.merge([Moments.of(unit_vectors(5, 3)), Moments.of(unit_vectors(5, 4))])
    with pytest.raises(ValueError, match="1 to 3 components, not 4"):
        Moments.of(unit_vectors(5, 3)).pca(4)


def test_a_sidecar_of_another_tar_is_made_again_from_the_vectors(tmp_path: Path) -> None:
    make_set(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "000000.moments.npz").write_bytes(before["000001.moments.npz"])
    (tmp_path / "000001.moments.npz").unlink()
    (tmp_path / "000002.moments.npz").write_bytes(b"nothing")
    finish_set(tmp_path, 3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
