"""Precomputed vectors are read, normalised, and refused by name if they are invalid."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.teacher.imported import ImportedVectors
from distill.teacher.teacher_config import TeacherConfig

VECTORS = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
UNIT = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float16)


def imported(path, **config):
    return ImportedVectors(TeacherConfig(vectors=str(path), **config))


def write_parquet(path, rows, kind=None, **options):
    pq.write_table(
        pa.table({"text": ["x"] * len(rows), "embedding": pa.array(rows, kind or pa.list_(pa.float32()))}), path, **options
    )
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_rows_are_normalised_in_any_float_type(tmp_path, dtype):
    np.save(tmp_path / "v.npy", VECTORS.astype(dtype))
    found = imported(tmp_path / "v.npy")
    numbers = np.array([7, 0, 49, 7])
    assert len(found) == 50 and found.read([], numbers).dtype == np.float16
    assert np.allclose(found.read([], numbers), UNIT[numbers], atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 8)],
    ids=["float", "double", "large", "fixed"],
)
def test_parquet_lists_of_every_kind_are_rows(tmp_path, kind):
    path = write_parquet(tmp_path / "v.parquet", VECTORS.tolist(), kind, row_group_size=7)
    found = imported(path)
    assert len(found) == 50 and np.allclose(found.read([], np.arange(50)), UNIT, atol=1e-3)


def test_a_missing_column_or_one_without_vectors_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "v.parquet", VECTORS.tolist())
    with pytest.raises(ValueError, match=r"no column vector; it has text, embedding: set teacher\.vectors_field"):
        imported(path, vectors_field="vector")
    with pytest.raises(ValueError, match=r"column text .* holds string, not lists of floats"):
        imported(path, vectors_field="text")


@pytest.mark.parametrize(
    "rows", [[[1.0, 2, 3], [4.0]], [[1.0, 2], None, [3.0, 4], None], [[1.0, 2], []], [[], []], []],
    ids=["ragged", "null", "empty", "all-empty", "no-rows"],
)  # fmt: skip
def test_parquet_vectors_that_differ_in_length_or_are_empty_or_null_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="differ in length, are empty or null"):
        imported(write_parquet(tmp_path / "v.parquet", rows))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_without_a_direction_is_named_by_its_number(tmp_path, bad):
    broken = VECTORS.copy()
    broken[31] = bad
    np.save(tmp_path / "v.npy", broken)
    found = imported(tmp_path / "v.npy")
    found.read([], np.arange(31))
    with pytest.raises(ValueError, match=r"row 31 of .*v\.npy is zero or not finite"):
        found.read([], np.array([2, 31, 5]))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool, np.complex64])
def test_vectors_that_are_no_floats_are_refused_by_type(tmp_path, dtype):
    np.save(tmp_path / "v.npy", (3 * VECTORS).astype(dtype))
    with pytest.raises(ValueError, match=rf"v\.npy holds {np.dtype(dtype)}, not float16, float32 or float64"):
        imported(tmp_path / "v.npy")


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e38, np.float32), (1e-40, np.float32), (1e300, np.float64), (1e-300, np.float64)]
)
def test_very_long_and_very_short_vectors_have_a_direction(tmp_path, size, dtype):
    np.save(tmp_path / "v.npy", (VECTORS.astype(np.float64) * (size / float(np.abs(VECTORS).max()))).astype(dtype))
    found = imported(tmp_path / "v.npy").read([], np.arange(50))
    assert np.allclose(found, UNIT, atol=1e-3)


def test_a_pickled_npy_is_refused_and_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    np.save(tmp_path / "v.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"v\.npy is not a plain \.npy array"):
        imported(tmp_path / "v.npy")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name, content", [("v.npy", b""), ("v.npy", b"text"), ("v.parquet", b"text"), ("v.parquet", b"")])
def test_a_file_that_is_something_else_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"teacher.vectors: .*{name} is not a"):
        imported(tmp_path / name)


def test_a_cut_off_npy_is_refused(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS)
    data = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"v\.npy is not a plain \.npy array"):
        imported(tmp_path / "v.npy")


def test_other_shapes_types_and_places_are_refused(tmp_path):
    np.save(tmp_path / "flat.npy", np.ones(4))
    with pytest.raises(ValueError, match=r"has shape \(4,\); it must be \[texts, dimensions\]"):
        imported(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="no file at"):
        imported(tmp_path / "none.npy")
    (tmp_path / "v.pt").touch()
    with pytest.raises(ValueError, match=r"is neither \.npy nor \.parquet"):
        imported(tmp_path / "v.pt")
