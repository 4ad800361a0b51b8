"""A set behind a URL reads as it would from its folder, each shard fetched once and checked; nothing else is opened."""

from __future__ import annotations

import pickle
import shutil

import fsspec
import numpy as np
import pytest
from shard_sets import flip, make_set

from distill.shards import ShardError, ShardReader


@pytest.fixture
def here(tmp_path):
    make_set(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(params=["file", "memory"])
def url(here, request):
    if request.param == "file":
        return f"file://{here}"
    memory = fsspec.filesystem("memory")
    memory.put(str(here) + "/", "/far/set/", recursive=True)
    return "memory://far/set"


def test_a_remote_set_reads_like_a_local_one(here, url, tmp_path):
    local, remote = ShardReader(here), ShardReader(url, cache=tmp_path / "cache")
    rows = np.random.default_rng(0).permutation(len(local))
    assert remote.texts(rows) == local.texts(rows)
    assert np.array_equal(remote.vectors(rows), local.vectors(rows)) and np.array_equal(remote.hashes(rows), local.hashes(rows))
    assert np.allclose(remote.moments.mean, local.moments.mean)
    assert len(pickle.loads(pickle.dumps(remote))) == len(local)  # noqa: S301, as a data loader's worker gets it


def test_a_shard_is_fetched_when_it_is_touched_and_only_once(here, tmp_path):
    reader = ShardReader(f"file://{here}", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    text = reader[0][0]
    assert [path.name for path in (tmp_path / "cache").rglob("*.tar")] == ["000000.tar"]
    (here / "000000.tar").unlink()
    assert ShardReader(f"file://{here}", cache=tmp_path / "cache")[0][0] == text


def test_a_shard_that_is_damaged_there_is_named_and_not_kept(here, tmp_path):
    tar = bytearray((here / "000000.tar").read_bytes())
    tar[3000] ^= 1
    (here / "000000.tar").write_bytes(tar)
    with pytest.raises(ShardError, match=r"file://.*000000\.tar: not the file that the manifest lists"):
        ShardReader(f"file://{here}", cache=tmp_path / "cache")[0]
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_copy_that_was_damaged_here_is_dropped_and_fetched_again(here, tmp_path):
    text = ShardReader(f"file://{here}", cache=tmp_path / "cache")[0][0]
    copy = next((tmp_path / "cache").rglob("000000.tar"))
    data = bytearray(copy.read_bytes())
    data[3000] ^= 1
    copy.write_bytes(data)
    with pytest.raises(ShardError, match="was deleted, try again"):
        ShardReader(f"file://{here}", cache=tmp_path / "cache")[0]
    assert ShardReader(f"file://{here}", cache=tmp_path / "cache")[0][0] == text


@pytest.mark.parametrize("name", ["manifest.json", "moments.npz"])
def test_a_damaged_remote_manifest_does_not_replace_the_valid_one_in_the_cache(here, tmp_path, name):
    text = ShardReader(f"file://{here}", cache=tmp_path / "cache")[0][0]
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flip(here / name, 150)
    with pytest.raises(ShardError, match=rf"file://.*{name}: "):
        ShardReader(f"file://{here}", cache=tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert ShardReader(folder)[0][0] == text


@pytest.mark.parametrize("place", ["pipe:touch ran", "pipe://touch ran", "simplecache::file:///tmp", "nosuch://bucket/set"])
def test_what_is_no_plain_url_of_a_file_system_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a plain URL"):
        ShardReader(place, cache=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_url_without_a_cache_or_without_a_set_is_refused(here, tmp_path):
    with pytest.raises(ValueError, match="name a local folder"):
        ShardReader(f"file://{here}")
    shutil.rmtree(here)
    with pytest.raises(ShardError, match=r"manifest\.json: there is no such file"):
        ShardReader(f"file://{here}", cache=tmp_path / "cache")
