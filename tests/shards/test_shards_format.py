from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from shard_sets import BLOCK_ROWS, DIM, finish_set, make_set, make_texts, text_hashes, unit_vectors, write_one

from distill.run.files import publish, seal, sweep, unseal, write_json
from distill.shards import Manifest, ShardError, missing, write_shard
from distill.shards.blocks import NPY_HEADER
from distill.shards.repair import repair
from distill.shards.verify import verify_all


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_set(tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert {"000000.tar", "000000.moments.npz", "moments.npz", "recipe.json", "manifest.json"} <= one.keys()


@pytest.mark.parametrize("with_held_out", [True, False])
def test_datasets_reads_the_held_out_texts_as_a_split_of_their_own(tmp_path: Path, monkeypatch, with_held_out) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if with_held_out:
        make_set(tmp_path / "shards/held_out", (7,))
    make_set(tmp_path / "shards")
    found = datasets.load_dataset(str(tmp_path / "shards"))
    texts = {split: sum(len(offsets) - 1 for offsets in found[split]["offset.npy"]) for split in found}
    assert texts == {"train": 121} | ({"test": 7} if with_held_out else {})
    if with_held_out:
        assert datasets.load_dataset(str(tmp_path / "shards/held_out"))["test"].num_rows == 1
    (tmp_path / "shards/README.md").write_text("the user's own\n")
    assert verify_all(tmp_path / "shards") == [] and repair(tmp_path / "shards") == ([], True)


def test_plain_webdataset_reads_it_in_a_few_lines(tmp_path: Path) -> None:
    make_set(tmp_path)
    import webdataset as wds

    urls = f"{tmp_path}/{{000000..000002}}.tar"
    read = []
    members = ("txt", "offset.npy", "embedding.npy", "hash.npy")
    for txt, offsets, embedding, hashes in wds.WebDataset(urls, shardshuffle=False).decode().to_tuple(*members):
        texts = [txt.encode()[start : end - 1].decode() for start, end in pairwise(offsets)]
        read += zip(texts, embedding, hashes, strict=True)

    assert [text for text, _, _ in read] == make_texts(50, 0) + make_texts(50, 1) + make_texts(21, 2)
    assert np.array_equal([vector for _, vector, _ in read[:50]], unit_vectors(50, DIM, 0))
    assert [number for _, _, number in read[50:100]] == (text_hashes(50) + 1).tolist()


def test_a_tar_has_no_owner_no_time_and_nothing_but_plain_files(tmp_path: Path) -> None:
    write_one(tmp_path, 3)
    with tarfile.open(tmp_path / "000003.tar", "r:") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:5]] == [
        f"000003-000000.{m}" for m in ("embedding.npy", "hash.npy", "json", "offset.npy", "txt")
    ]
    assert len(members) == 5 * 4
    assert {(m.isreg(), m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(True, 0o644, 0, 0, 0, "", "")}
    assert (tmp_path / "000003.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_numpy_reads_every_array_without_pickle(tmp_path: Path) -> None:
    write_one(tmp_path, 0)
    expected = {"embedding": unit_vectors(50, DIM)[:BLOCK_ROWS], "hash": text_hashes(50)[:BLOCK_ROWS]}
    with tarfile.open(tmp_path / "000000.tar", "r:") as tar:
        for name, array in expected.items():
            member = tar.getmember(f"000000-000000.{name}.npy")
            assert member.offset_data % 64 == NPY_HEADER % 64 == 0
            (tmp_path / "member.npy").write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            assert np.array_equal(np.load(tmp_path / "member.npy", allow_pickle=False), array)
        text = tar.extractfile("000000-000000.txt").read()  # type: ignore[union-attr]
        (tmp_path / "member.npy").write_bytes(tar.extractfile("000000-000000.offset.npy").read())  # type: ignore[union-attr]
        offset = np.load(tmp_path / "member.npy", allow_pickle=False)
    assert [text[a : b - 1].decode() for a, b in pairwise(offset)] == make_texts(50)[:BLOCK_ROWS]


@pytest.mark.parametrize("dim", [384, 768])
def test_overhead_is_below_1_15_at_768_dimensions_and_at_384(tmp_path: Path, dim: int) -> None:
    num = 4096
    texts, vectors = make_texts(num), unit_vectors(num, dim)
    arguments = {"block_rows": 1024, "teacher_fingerprint": "t" * 64, "text_fingerprint": "p" * 64}
    write_shard(tmp_path, 0, texts, text_hashes(num), vectors, **arguments)
    raw = vectors.nbytes + sum(len(text.encode()) for text in texts)
    assert (tmp_path / "000000.tar").stat().st_size / raw < (1.05 if dim == 384 else 1.03)


def test_missing_is_a_pure_function_of_the_directory(tmp_path: Path) -> None:
    assert missing(tmp_path / "nowhere", 2) == [0, 1]
    write_one(tmp_path, 1)
    (tmp_path / ".000000.tar.1-ab.part").touch()
    assert missing(tmp_path, 3) == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": unit_vectors(3, 4).astype(np.float32)}, "float32"),
        ({"vectors": unit_vectors(2, 4)}, r"\(2, 4\)"),
        ({"vectors": unit_vectors(3, 4) * np.float16(1.01)}, "text 0 has norm .* line 1 of chunk 000000 .*, is 'a'"),
        ({"vectors": np.full((3, 4), np.nan, np.float16)}, "norm nan"),
        ({"hashes": np.zeros(3, np.int32)}, "int32"),
        ({"texts": ["a", "b", "\ud800"]}, "000000.tar: block 1, text 0 is not valid Unicode"),
        ({"block_rows": 0}, "blocks of 0"),
        ({"index": -1}, "shard -1"),
    ],
)
def test_input_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, change: dict, message: str) -> None:
    fitting = {"index": 0, "texts": ["a", "b", "c"], "hashes": np.zeros(3, np.int64), "vectors": unit_vectors(3, 4)}
    arguments = {**fitting, "block_rows": 2, "teacher_fingerprint": "t", "text_fingerprint": "p", **change}
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


DISK_FULL = """
import resource, signal, sys
from pathlib import Path
from shard_sets import write_one
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_one(Path(sys.argv[1]), 0)
except OSError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert result.returncode == 1
    assert "refused: " in result.stderr and "000000.tar" in result.stderr
    assert not list(tmp_path.iterdir())


def test_disk_full_leaves_nothing_behind(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(OSError, match=r"No space left on device.*000000\.tar"):
            write_one(tmp_path, 0)
        left = [path.name for path in tmp_path.iterdir()]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert left == []


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt), publish(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with publish(path) as file:
        file.write(b"first")
    with pytest.raises(RuntimeError), publish(path) as file:
        raise RuntimeError
    assert path.read_bytes() == b"first"
    with publish(path) as slow, publish(path) as fast:
        slow.write(b"slow")
        fast.write(b"fast")
    assert path.read_bytes() == b"slow" and len(list(tmp_path.iterdir())) == 1


def test_whoever_sees_a_published_file_may_rename_its_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "step.part", Path.replace
    folder.mkdir()

    def replace_and_be_overtaken(part: Path, path: Path) -> None:
        replace(part, path)
        folder.rename(tmp_path / "step")

    monkeypatch.setattr(Path, "replace", replace_and_be_overtaken)
    with publish(folder / "rank-00001.json") as file:
        file.write(b"written")
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["rank-00001.json"]


def test_what_a_killed_writer_left_is_swept_up_when_it_is_old(tmp_path: Path) -> None:
    make_set(tmp_path)
    for name, age in ((".000000.tar.1-ab.part", 7200), (".000000.tar.2-cd.part", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    finish_set(tmp_path, 3)
    assert [path.name for path in tmp_path.glob(".*")] == [".000000.tar.2-cd.part"]


def test_what_a_killed_process_of_this_machine_left_is_swept_up_at_once(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    write = "import os, sys, signal, pathlib; from distill.run.files import publish\n"
    write += "with publish(pathlib.Path(sys.argv[1])) as file: os.kill(os.getpid(), signal.SIGKILL)"
    for name in ("config.yaml", "stage/.000000.claim"):
        assert subprocess.run([sys.executable, "-c", write, str(tmp_path / name)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob(".*.part"))) == 2
    with publish(tmp_path / "stage/DONE.json") as file:  # of a process that lives
        sweep(tmp_path)
        assert len(list(tmp_path.rglob(".*.part"))) == 1
        file.write(b"{}")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["DONE.json"]


def test_any_changed_byte_of_sealed_json_shows() -> None:
    raw = seal({"b": [1, "ä"], "a": {"x": None}})
    assert unseal(raw) == {"a": {"x": None}, "b": [1, "ä"]}
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        with pytest.raises(ValueError):
            unseal(bytes(damaged))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2; this program reads 1"),
        ({"count": 120}, "count is 120, but the shards' rows add up to 121"),
        ({"dim": "24"}, "dim: Input should be a valid integer"),
        ({"dtype": "float64"}, "dtype: Input should be 'float16'"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"shards": []}, "shards: Tuple should have at least 1 item"),
        ({"moments_sha256": "zz"}, "moments_sha256: String should match pattern"),
        ({"name": "../000001.tar"}, r"shards\.1\.name is '../000001.tar', not '000001.tar'"),
        ({"name": "/etc/passwd"}, "/etc/passwd"),
        ({"name": "pipe:touch x"}, "pipe:touch x"),
        ({"name": "000000.tar"}, "not '000001.tar'"),
        ({"rows_of_1": 0}, r"shards\.1\.rows: Input should be greater than 0"),
        ({"sha256": None}, r"shards\.1\.sha256: Input should be a valid string"),
    ],
)
def test_a_manifest_that_is_sealed_but_wrong_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    make_set(tmp_path)
    path = tmp_path / "manifest.json"
    value = unseal(path.read_bytes(), indent=1)
    ((key, new),) = change.items()
    if key in ("name", "sha256", "rows_of_1"):
        value["shards"][1][key.removesuffix("_of_1")] = new
    else:
        value[key] = new
    write_json(path, value)
    with pytest.raises(ShardError, match=f"^{re.escape(str(path))}: .*{message}"):
        Manifest.load(tmp_path)


def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path) -> None:
    make_set(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    value["dim"] = 25
    path.write_text(json.dumps(value, indent=1, sort_keys=True))
    with pytest.raises(ShardError, match=r"manifest\.json: it was changed after it was written"):
        Manifest.load(tmp_path)
