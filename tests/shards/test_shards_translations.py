"""Translations in shards: beside their texts, verified and repaired as they are, absent where there are none."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from shard_sets import TEACHER, flip, make_set, make_texts, text_hashes, unit_vectors

from distill.run.files import read_json
from distill.shards import Manifest, ShardError, ShardReader, fingerprint, finish, repair, verify_all, write_shard
from distill.shards import blocks as shard_blocks
from distill.shards.__main__ import main
from distill.shards.format import RECIPE

ROWS, BLOCK_ROWS, DIM = 40, 16, 8
SOURCES = [{"name": "plain.txt", "role": None}, {"name": "rows.tsv", "role": None, "columns": ["en", "de", "fr"]}]
NUM_PLAIN = 50  # the whole of shard 0, and the first block but six rows of shard 1
TEXTS = make_texts(2 * ROWS + 7)
GERMAN = [f"de: {text}" if row >= NUM_PLAIN and row % 3 else "" for row, text in enumerate(TEXTS)]
FRENCH = [f"fr: {text}" if row >= 2 * ROWS else "" for row, text in enumerate(TEXTS)]
COUNTS = [[], [[1, 1, sum(map(bool, GERMAN[ROWS : 2 * ROWS]))]], [[1, 1, sum(map(bool, GERMAN[2 * ROWS :]))], [1, 2, 7]]]


def write_shards(folder: Path, numbers=range(3)) -> None:
    for index in numbers:
        rows = slice(index * ROWS, (index + 1) * ROWS)
        texts = TEXTS[rows]
        write_shard(
            folder,
            index,
            texts,
            text_hashes(len(TEXTS))[rows],
            unit_vectors(len(TEXTS), DIM)[rows],
            (np.arange(len(TEXTS)) >= NUM_PLAIN).astype(np.uint16)[rows],
            block_rows=BLOCK_ROWS,
            teacher_fingerprint=fingerprint(TEACHER),
            text_fingerprint=f"chunk {index}",
            translations=[GERMAN[rows], FRENCH[rows]],
        )


def finish_set(folder: Path) -> Manifest:
    of_text = {"text_fingerprint": "text", "text_fingerprints": [f"chunk {index}" for index in range(3)]}
    teacher = {"teacher": TEACHER, "teacher_fingerprint": fingerprint(TEACHER)}
    return finish(folder, **teacher, **of_text, rows=ROWS, block_rows=BLOCK_ROWS, sources=SOURCES)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_shards(tmp_path)
    finish_set(tmp_path)
    return tmp_path


def members(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        return {member.name: member for member in tar}


def test_a_text_is_read_in_any_column_and_a_missing_translation_is_empty(folder):
    reader = ShardReader(folder)
    draw = np.random.default_rng(0)
    rows, columns = draw.integers(len(reader), size=500), draw.integers(3, size=500)
    expected = [[TEXTS, GERMAN, FRENCH][column][row] for row, column in zip(rows, columns, strict=True)]
    assert reader.texts(rows, columns) == expected and "" in expected
    assert reader.lengths(rows, columns).tolist() == [len(text.encode()) for text in expected]
    assert reader.texts(rows) == [TEXTS[row] for row in rows] and reader[60][0] == TEXTS[60]
    assert (reader.num_columns, reader.num_samples) == (3, len(TEXTS) + sum(map(bool, GERMAN + FRENCH)))


def test_the_manifest_counts_translations_by_source_and_column(folder):
    manifest = Manifest.load(folder)
    assert [entry.translations for entry in manifest.shards] == COUNTS
    assert manifest.sources[1].columns == ["en", "de", "fr"] and manifest.sources[0].columns == []
    assert manifest.recipe()["sources"] == SOURCES


def test_a_block_without_a_translation_has_no_bytes_of_it(folder):
    names = [
        name.partition(".")[0] for number in range(3) for name in members(folder / f"{number:06d}.tar") if "translation" in name
    ]
    assert set(names) == {"000001-000000", "000001-000001", "000001-000002", "000002-000000"}
    assert [name for name in members(folder / "000002.tar") if "translation" in name] == [
        f"000002-000000.translation{column}.{kind}" for column in ("01", "02") for kind in ("offset.npy", "txt")
    ]


def test_a_set_without_translations_is_as_it_was(tmp_path):
    make_set(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    assert "sources" not in manifest and all("translations" not in entry for entry in manifest["shards"])
    assert not any("translation" in name for name in members(tmp_path / "000000.tar"))


@pytest.mark.parametrize("kind", ["translation01.offset.npy", "translation01.txt"])
@pytest.mark.parametrize("part", ["header", "start", "middle", "end"])
def test_a_flipped_bit_of_a_translation_is_found_and_its_member_named(folder, kind, part):
    path = folder / "000001.tar"
    member = members(path)[f"000001-000001.{kind}"]
    offset = {"header": -100, "start": 0, "middle": member.size // 2, "end": member.size - 1}[part]
    flip(path, member.offset_data + offset)
    (problem,) = verify_all(folder)
    assert problem.startswith(f"000001.tar: block 1, member {kind}: ")
    with pytest.raises(ShardError, match=f"000001.tar: block 1, member {kind}: "):
        ShardReader(folder)[55]


def test_a_damaged_shard_is_deleted_and_made_again_and_a_lost_manifest_is_rebuilt(folder):
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    member = members(folder / "000002.tar")["000002-000000.translation02.txt"]
    flip(folder / "000002.tar", member.offset_data)
    actions, whole = repair(folder)
    assert not whole and "translation02.txt" in actions[0] and not (folder / "000002.tar").exists()
    write_shards(folder, [2])
    assert repair(folder)[1] and {path.name: path.read_bytes() for path in folder.iterdir()} == intact
    assert (folder / RECIPE).exists() and main(["verify", str(folder)]) == 0 and main(["info", str(folder)]) == 0


def with_members(data: dict[str, bytes], path: Path) -> None:
    """A tar of one block with these members, in this order."""
    parts = []
    for name, content in data.items():
        parts += [shard_blocks._tar_header(f"000000-000000.{name}", len(content)), content, bytes(-len(content) % 512)]
    tar = b"".join(parts)
    path.write_bytes(tar + shard_blocks.tar_end(len(tar)))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda data: data, None),
        (lambda data: data | {"translation01.txt": b"\n" * 3}, "it does not span the text"),
        (lambda data: {name: data[name] for name in data if name != "translation01.txt"}, "describes other members"),
        (lambda data: {name: data[name] for name in [*list(data)[:-3], *list(data)[-2:], list(data)[-3]]}, "other members"),
        (lambda data: {name: data[name] for name in [*list(data)[:-3], list(data)[-2], list(data)[-3], "txt"]}, "wrong place"),
    ],
)
def test_members_that_the_writer_does_not_write_are_refused(tmp_path, change, problem):
    of_set = {"teacher_fingerprint": "t", "text_fingerprint": "u"}
    encoded = shard_blocks.encode_block(
        0, 0, ["a", "b", "c"], text_hashes(3), unit_vectors(3, 4), None, [["", "d", ""]], **of_set
    )
    path = tmp_path / "000000.tar"
    path.write_bytes(encoded + shard_blocks.tar_end(len(encoded)))
    whole = path.read_bytes()
    data = {name.partition(".")[2]: whole[m.offset_data : m.offset_data + m.size] for name, m in members(path).items()}
    with_members(change(data), path)
    if problem is None:
        assert path.read_bytes() == whole
        return
    with pytest.raises(ShardError, match=problem):
        shard_blocks.inspect(shard_blocks.open_map(path), 0)


def test_translations_that_do_not_fit_their_texts_are_refused(tmp_path):
    of_set = {"block_rows": 16, "teacher_fingerprint": "t", "text_fingerprint": "u"}
    with pytest.raises(ValueError, match="a column of translations has 2 entries for 3 texts"):
        write_shard(tmp_path, 0, ["a", "b", "c"], text_hashes(3), unit_vectors(3, 4), translations=[["x", ""]], **of_set)
    assert list(tmp_path.iterdir()) == []
