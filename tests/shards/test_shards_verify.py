from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shard_sets import finish_set, flip, make_set, write_one

from distill.shards import ShardError, ShardReader, finish, missing, repair, verify_all
from distill.shards.__main__ import main
from distill.shards.format import RECIPE

KINDS = ("embedding.npy", "hash.npy", "json", "offset.npy", "txt")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    make_set(tmp_path / "shards")
    return tmp_path / "shards"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        return {member.name: member for member in tar}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["header", "start", "middle", "end"])
@pytest.mark.parametrize("block", [0, 2])
def test_a_flipped_bit_is_found_and_its_member_named(whole: Path, kind: str, part: str, block: int) -> None:
    path = whole / "000001.tar"
    member = members(path)[f"000001-{block:06d}.{kind}"]
    offset = {"header": -100, "start": 0, "middle": member.size // 2, "end": member.size - 1}[part]
    flip(path, member.offset_data + offset)
    (problem,) = verify_all(whole)
    assert problem.startswith(f"000001.tar: block {block}, member {kind}: ")
    with pytest.raises(ShardError, match=f"000001.tar: block {block}, member {kind}: "):
        ShardReader(whole)[55]


def test_every_single_flipped_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    make_set(tmp_path, (3,))
    path = tmp_path / "000000.tar"
    intact = path.read_bytes()
    (tmp_path / "manifest.json").unlink()
    for position in range(0, len(intact), 7):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x10]) + intact[position + 1 :])
        _, *problems = verify_all(tmp_path)
        assert len(problems) == 1, position


def test_every_flipped_byte_beside_the_tars_is_found(tmp_path: Path) -> None:
    make_set(tmp_path, (3,))
    for path in (p for p in tmp_path.iterdir() if p.suffix != ".tar" and p.name != "README.md"):  # which nothing here reads
        intact = path.read_bytes()
        for position in range(0, len(intact), 13):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
            assert verify_all(tmp_path), (path, position)
        path.write_bytes(intact)
    assert verify_all(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 1, 512, 10_240, 12_000, -10_240, -1])
def test_a_truncated_shard_is_found(whole: Path, keep: int) -> None:
    path = whole / "000002.tar"
    path.write_bytes(path.read_bytes()[:keep])
    (problem,) = verify_all(whole)
    assert problem.startswith("000002.tar: ")
    with pytest.raises(ShardError, match=r"000002.tar: "):
        ShardReader(whole)[120]


def test_a_renamed_shard_is_found(whole: Path) -> None:
    (whole / "000000.tar").rename(whole / "other")
    (whole / "000001.tar").rename(whole / "000000.tar")
    (whole / "other").rename(whole / "000001.tar")
    problems = verify_all(whole)
    assert len(problems) == 2 and all("renamed" in problem for problem in problems)


def test_a_foreign_shard_is_found(whole: Path) -> None:
    write_one(whole, 1, teacher={"model": "another"})
    problems = verify_all(whole)
    assert problems[0].startswith("000001.tar: foreign, made by teacher ")
    (whole / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"000001.tar: foreign, made by teacher .*repair"):
        finish_set(whole, 3)


def test_a_whole_shard_that_is_not_the_listed_one_is_found(whole: Path) -> None:
    write_one(whole, 1, 49)
    assert verify_all(whole)[0].startswith("000001.tar: 49 rows")


def test_a_missing_shard_and_one_too_many_are_found(whole: Path) -> None:
    shutil.copy(whole / "000001.tar", whole / "000007.tar")
    (whole / "000001.tar").unlink()
    assert verify_all(whole) == ["000001.tar: missing", "000007.tar: in the folder and not in the manifest"]
    with pytest.raises(ShardError, match=r"lacks 1 of 3 shards, the first is 000001.tar"):
        finish_set(whole, 3)


def rewrite(path: Path, change: str) -> None:
    """Writes the tar again with one member made malicious, by the standard library."""
    with tarfile.open(path, "r:") as tar:
        content = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (member, data) in enumerate(content):
            if number == 1 and change in ("../../evil", "/evil"):
                member.name = change
            if number == 1 and change == "link":
                member.type, member.linkname, member.size, data = tarfile.SYMTYPE, "/etc/passwd", 0, b""
            if number == 1 and change == "device":
                member.type, member.size, data = tarfile.CHRTYPE, 0, b""
            if number == 1 and change == "duplicate":
                member.name = content[0][0].name
            if number == 1 and change == "pickle":
                buffer = io.BytesIO()
                np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
                data = buffer.getvalue()
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if change == "further":
            extra = tarfile.TarInfo("000000-000000.pickle")
            extra.size = 4
            tar.addfile(extra, io.BytesIO(b"evil"))


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def assert_refused(whole: Path, change: str, message: str) -> None:
    rewrite(whole / "000000.tar", change)
    (problem,) = verify_all(whole)
    assert message in problem
    for verify in (True, False):
        with pytest.raises(ShardError, match=r"000000\.tar"):
            ShardReader(whole, verify=verify)[0]


def test_a_pickle_in_an_npy_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole)
    assert_refused(whole, "pickle", "member hash.npy: not a plain <i8 array of shape (16,) (pickled or foreign)")
    assert not (whole / "evil").exists()
    pickle.loads(pickle.dumps(Evil()))  # noqa: S301, to show that it would run
    assert (whole / "evil").exists(), "the pickle would have run"


@pytest.mark.parametrize("name", ["../../evil", "/evil"])
def test_a_path_traversal_name_is_refused(whole: Path, name: str) -> None:
    assert_refused(whole, name, f"a member named '{name}', not '000000-000000.hash.npy': an unsafe path")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("link", "it is a link, device or folder"),
        ("device", "it is a link, device or folder"),
        ("duplicate", "in its place is a member named '000000-000000.embedding.npy'"),
        ("further", "in its place is a member named '000000-000000.pickle'"),
    ],
)
def test_a_member_that_a_shard_does_not_have_is_refused(whole: Path, change: str, message: str) -> None:
    assert_refused(whole, change, message)


def test_repair_requeues_only_what_is_bad(whole: Path) -> None:
    before = snapshot(whole)
    flip(whole / "000001.tar", 700)
    actions, is_whole = repair(whole)
    assert not is_whole and actions[0].startswith("to be made again: 000001.tar: block 0, member embedding.npy")
    assert missing(whole, 3) == [1]
    assert {name: before[name] for name in ("000000.tar", "000002.tar")}.items() <= snapshot(whole).items()
    with pytest.raises(ShardError, match="run precompute"):
        ShardReader(whole)
    write_one(whole, 1)
    finish_set(whole, 3)
    assert snapshot(whole) == before


def test_repair_of_a_whole_set_changes_nothing(whole: Path) -> None:
    before = snapshot(whole)
    assert repair(whole) == ([], True)
    assert snapshot(whole) == before


@pytest.mark.parametrize("name", ["manifest.json", "moments.npz", RECIPE, "000001.moments.npz"])
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_repair_rebuilds_what_follows_from_good_shards(whole: Path, name: str, how: str) -> None:
    before = snapshot(whole)
    if how == "missing":
        (whole / name).unlink()
    else:
        flip(whole / name, 150)
    assert verify_all(whole)
    actions, is_whole = repair(whole)
    assert is_whole and name in " ".join(actions)
    assert snapshot(whole) == before


def test_repair_keeps_good_shards_where_both_descriptions_are_lost(whole: Path) -> None:
    before = snapshot(whole)
    for name in ("manifest.json", RECIPE):
        flip(whole / name, 30)
    flip(whole / "000000.tar", 700)
    actions, is_whole = repair(whole)
    assert not is_whole and "run precompute again" in actions[-1]
    assert missing(whole, 3) == [0]
    write_one(whole, 0)
    finish_set(whole, 3)
    assert snapshot(whole) == before


def test_repair_without_a_manifest_throws_out_a_foreign_shard(whole: Path) -> None:
    (whole / "manifest.json").unlink()
    write_one(whole, 1, teacher={"model": "another"})
    actions, _ = repair(whole)
    assert "000001.tar: foreign" in actions[0] and missing(whole, 3) == [1]


def test_repair_sets_a_stranger_aside(whole: Path) -> None:
    shutil.copy(whole / "000001.tar", whole / "000007.tar")
    repair(whole)
    assert verify_all(whole) == [] and (whole / "000007.tar.unlisted").exists()


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the text empty"):
        finish(
            tmp_path,
            teacher={},
            teacher_fingerprint="",
            text_fingerprint="",
            text_fingerprints=[],
            rows=1,
            block_rows=1,
        )


def test_the_commands_exit_0_only_if_every_byte_is_as_it_was_written(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(whole / "held_out", (9,))
    assert main(["verify", str(whole)]) == 0
    assert main(["info", str(whole)]) == 0
    assert "model=tiny" in capsys.readouterr().out
    flip(whole / "held_out" / "000000.tar", 700)
    command = [sys.executable, "-m", "distill.shards", "verify", str(whole)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr == ""
    assert "held_out: 000000.tar: block 0, member embedding.npy" in result.stdout
    assert main(["repair", str(whole)]) == 1
    assert missing(whole / "held_out", 1) == [0] and missing(whole, 3) == []
    assert main(["verify", str(whole / "nowhere")]) == 1
