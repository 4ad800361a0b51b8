"""Precomputed vectors are read, normalised, and refused by name if they are invalid."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_config
from reference_times import hang_limit
from safetensors.torch import save_file

from distill.config import load_config, stage_of
from distill.corpus import TextChunk
from distill.shards import Manifest, ShardReader
from distill.teacher.imported import ImportedVectors
from distill.teacher.teacher_config import TeacherConfig

VECTORS = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
UNIT = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float16)


def imported(path, **config):
    given = [str(each) for each in path] if isinstance(path, list) else str(path)
    return ImportedVectors(TeacherConfig(vectors=given, **config))


def rows_of(found, numbers=None):
    return found.read(TextChunk([], np.arange(len(found)) if numbers is None else np.array(numbers), None))


def write_safetensors(path, rows, dtype=torch.float32, name="vectors", **others):
    save_file({name: torch.from_numpy(rows).to(dtype), **others}, path)
    return path


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
    assert len(found) == 50 and found.read(TextChunk([], numbers, None)).dtype == np.float16
    assert np.allclose(found.read(TextChunk([], numbers, None)), UNIT[numbers], atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 8)],
    ids=["float", "double", "large", "fixed"],
)
def test_parquet_lists_of_every_kind_are_rows(tmp_path, kind):
    path = write_parquet(tmp_path / "v.parquet", VECTORS.tolist(), kind, row_group_size=7)
    found = imported(path)
    assert len(found) == 50 and np.allclose(found.read(TextChunk([], np.arange(50), None)), UNIT, atol=1e-3)


def test_a_missing_column_or_one_without_vectors_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "v.parquet", VECTORS.tolist())
    with pytest.raises(ValueError, match=r"no column vector; it has text, embedding: set teacher\.vectors_field"):
        imported(path, vectors_field="vector")
    with pytest.raises(ValueError, match=r"column text .* holds string, not lists of floats"):
        imported(path, vectors_field="text")


@pytest.mark.parametrize(
    "rows", [[[1.0, 2, 3], [4.0]], [[1.0, 2], None, [3.0, 4], None], [[1.0, 2], []], [[], []]],
    ids=["ragged", "null", "empty", "all-empty"],
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
    found.read(TextChunk([], np.arange(31), None))
    with pytest.raises(ValueError, match=r"row 31 of .*v\.npy is zero or not finite"):
        found.read(TextChunk([], np.array([2, 31, 5]), None))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool, np.complex64])
def test_vectors_that_are_no_floats_are_refused_by_type(tmp_path, dtype):
    np.save(tmp_path / "v.npy", (3 * VECTORS).astype(dtype))
    with pytest.raises(
        ValueError, match=rf"v\.npy holds {np.dtype(dtype)}, not float16, .*: give the float vectors that they were"
    ):
        imported(tmp_path / "v.npy")


@pytest.mark.parametrize(
    ("size", "dtype"), [(1e38, np.float32), (1e-40, np.float32), (1e300, np.float64), (1e-300, np.float64)]
)
def test_very_long_and_very_short_vectors_have_a_direction(tmp_path, size, dtype):
    np.save(tmp_path / "v.npy", (VECTORS.astype(np.float64) * (size / float(np.abs(VECTORS).max()))).astype(dtype))
    found = imported(tmp_path / "v.npy").read(TextChunk([], np.arange(50), None))
    assert np.allclose(found, UNIT, atol=1e-3)


def test_a_pickled_npy_is_refused_and_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    np.save(tmp_path / "v.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"v\.npy is not a plain \.npy array"):
        imported(tmp_path / "v.npy")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"text"])
@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "v.safetensors"])
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
    with pytest.raises(ValueError, match=r"is neither \.npy nor \.safetensors nor \.parquet"):
        imported(tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"is a folder; add a glob"):
        imported(tmp_path)
    with pytest.raises(ValueError, match=r"no file at .*\*\.npz, and as a glob it matches none"):
        imported(tmp_path / "*.npz")
    with pytest.raises(ValueError, match=r"v\.parquet has no rows"):
        imported(write_parquet(tmp_path / "v.parquet", []))
    with pytest.raises(ValueError, match="lists no file"):
        imported([])


def test_files_are_read_in_the_order_of_the_list_and_those_of_a_glob_in_sorted_order(tmp_path):
    np.save(tmp_path / "b1.npy", VECTORS[30:])
    np.save(tmp_path / "b0.npy", VECTORS[10:30].astype(np.float64))
    write_safetensors(tmp_path / "z.safetensors", VECTORS[5:10])
    write_parquet(tmp_path / "a.parquet", VECTORS[:5].tolist())
    found = imported([tmp_path / "a.parquet", tmp_path / "z.safetensors", tmp_path / "b*.npy"])
    assert len(found) == 50 and found.dim == 8
    assert np.allclose(rows_of(found), UNIT, atol=1e-3)
    numbers = [49, 3, 9, 10, 3, 30, 29, 0]
    assert np.array_equal(rows_of(found, numbers), rows_of(found)[numbers])
    assert len(imported(tmp_path / "b*.npy")) == 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_rows_are_normalised_in_any_float_type(tmp_path, dtype):
    found = imported(write_safetensors(tmp_path / "v.safetensors", VECTORS, dtype))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert np.allclose(rows_of(found, [7, 0, 49, 7]), UNIT[[7, 0, 49, 7]], atol=tolerance)


def test_the_tensor_is_the_only_one_or_the_one_that_is_named(tmp_path):
    path = write_safetensors(tmp_path / "v.safetensors", VECTORS, name="passages", ids=torch.zeros(50))
    with pytest.raises(ValueError, match=r"has the tensors ids, passages, and none is called embedding: set teacher"):
        imported(path)
    assert np.allclose(rows_of(imported(path, vectors_field="passages")), UNIT, atol=1e-3)
    with pytest.raises(ValueError, match=r"has shape \(50,\)"):
        imported(path, vectors_field="ids")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_codes_in_safetensors_are_refused_by_type(tmp_path, dtype):
    path = write_safetensors(tmp_path / "v.safetensors", VECTORS, dtype)
    with pytest.raises(ValueError, match=r"v\.safetensors holds (I8|U8|BOOL|F8_E4M3), not .*: give the float vectors"):
        imported(path)


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.list_(pa.uint8()), pa.binary()])
def test_codes_in_parquet_are_refused_by_type(tmp_path, kind):
    rows = [b"\x01\x02"] * 3 if kind == pa.binary() else [[1, 2]] * 3
    with pytest.raises(ValueError, match=r"v\.parquet holds (list<.*int8>|binary), not .*: give the float vectors"):
        imported(write_parquet(tmp_path / "v.parquet", rows, kind))


def test_files_of_different_widths_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", VECTORS)
    write_safetensors(tmp_path / "b.safetensors", VECTORS[:, :6].copy())
    with pytest.raises(ValueError, match=r"b\.safetensors has 6 dimensions, and .*a\.npy 8"):
        imported([tmp_path / "a.npy", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet"])
def test_a_bad_row_of_several_files_is_named_by_its_file_and_its_number_in_it(tmp_path, suffix):
    broken = VECTORS.copy()
    broken[3] = 0
    write = {"npy": np.save, "safetensors": write_safetensors, "parquet": lambda path, rows: write_parquet(path, rows.tolist())}
    for number, rows in enumerate((VECTORS, broken)):
        write[suffix](tmp_path / f"{number}.{suffix}", rows)
    with pytest.raises(ValueError, match=rf"row 3 of .*1\.{suffix} is zero or not finite") as raised:
        rows_of(imported(tmp_path / f"*.{suffix}"))
    assert "\n" not in str(raised.value)


def test_a_ragged_row_far_from_the_beginning_of_a_parquet_file_is_found_on_opening_and_named(tmp_path):
    rows = np.ones((9000, 2)).tolist()
    rows[8500] = [1.0]
    with pytest.raises(ValueError, match=r"row 8500 has 1 numbers, the first 2"):
        imported(write_parquet(tmp_path / "v.parquet", rows, row_group_size=6000))


def test_a_parquet_file_is_read_forwards_backwards_and_across_row_groups(tmp_path):
    rows = np.random.default_rng(1).normal(size=(20_000, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = imported(write_parquet(tmp_path / "v.parquet", rows.tolist(), row_group_size=7000))
    for numbers in ([19_999], [0, 15_000], range(6990, 7010), [13_999, 14_000, 3], np.arange(20_000)[::-3]):
        assert np.allclose(rows_of(found, numbers), unit[np.array(numbers)], atol=1e-3)


def test_more_files_than_are_kept_open(tmp_path):
    for number in range(50):
        np.save(tmp_path / f"{number:02}.npy", VECTORS[number : number + 1])
    found = imported(tmp_path / "*.npy")
    assert np.allclose(rows_of(found, np.arange(50)[::-1]), UNIT[::-1], atol=1e-3)


READING = """
import sys
from pathlib import Path
import numpy as np
from distill.corpus import TextChunk
from distill.teacher.imported import ImportedVectors
from distill.teacher.teacher_config import TeacherConfig


def anonymous():
    "MB that the process cannot give back; pages of mapped files are not among them."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


found = ImportedVectors(TeacherConfig(vectors=sys.argv[1]))
found.read(TextChunk([], np.arange(8192), None))
before, most = anonymous(), 0.0
for start in range(0, len(found), 8192):
    found.read(TextChunk([], np.arange(start, min(start + 8192, len(found))), None))
    most = max(most, anonymous() - before)
print(most)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix):
    rows = np.random.default_rng(0).normal(size=(400_000, 64)).astype(np.float32)  # 102 MB
    path = tmp_path / f"v.{suffix}"
    if suffix == "npy":
        np.save(path, rows)
    elif suffix == "safetensors":
        write_safetensors(path, rows)
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 64)
        pq.write_table(pa.table({"embedding": column}), path)  # in one row group
    command = [sys.executable, "-c", READING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=hang_limit(), check=True)
    assert float(done.stdout) < 30


def run_of(folder, encoder, vectors, *overrides):
    overrides = [f"teacher={{vectors: {vectors}}}", f"student.init={encoder}", *overrides]
    return load_config(write_config(folder, encoder), overrides)


def test_a_set_from_several_files_is_that_from_one_and_a_changed_file_is_another_teacher(tmp_path, tiny_encoder):
    rows = np.random.default_rng(0).normal(size=(600, 12)).astype(np.float32)
    np.save(tmp_path / "all.npy", rows)
    np.save(tmp_path / "part0.npy", rows[:250])
    write_safetensors(tmp_path / "part1.safetensors", rows[250:])
    configs = [run_of(tmp_path, tiny_encoder, tmp_path / name, f"name={name[:3]}") for name in ("all.npy", "part*")]
    for config in configs:
        assert stage_of(config, "precompute").run(torch.device("cpu"))
        assert stage_of(config, "precompute").reason_to_run() is None
    readers = [ShardReader(config.shards_dir) for config in configs]
    every = np.arange(len(readers[0]))
    assert readers[0].texts(every) == readers[1].texts(every)
    assert np.array_equal(readers[0].vectors(every), readers[1].vectors(every))
    assert isinstance(Manifest.load(configs[0].shards_dir).teacher["sha256"], str)
    assert len(Manifest.load(configs[1].shards_dir).teacher["sha256"]) == 2
    np.save(tmp_path / "part0.npy", 2 * rows[:250])
    assert "part0.npy" in stage_of(configs[1], "precompute").reason_to_run()


def test_a_wrong_number_of_rows_names_the_files(tmp_path, tiny_encoder):
    for name, count in (("a", 250), ("b", 300)):
        np.save(tmp_path / f"{name}.npy", np.ones((count, 4)))
    config = run_of(tmp_path, tiny_encoder, [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])
    with pytest.raises(ValueError, match=r"a\.npy \(250\), .*b\.npy \(300\) has 550 rows, the text 600 raw texts"):
        stage_of(config, "precompute").run(torch.device("cpu"))
