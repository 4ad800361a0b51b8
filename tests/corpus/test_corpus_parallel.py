"""Parallel text: the teacher's column decides what is kept, translations follow it, empty ones are counted."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import sentences

from distill.corpus import is_held_out, normal_form, prepare_text, read_listed_chunk, read_source, spool, text_hash
from distill.corpus.chunks import chunk_fingerprint, translation_name
from distill.corpus.sources import check_source, read_translated
from distill.corpus.text_config import SourceConfig, TextConfig

COLUMNS = ["en", "de", "fr"]
ROWS = [
    ("One row.", "Eine Zeile.", "Une ligne."),
    ("Without German.", "", "Sans allemand."),
    ("One  row.", "Noch eine Zeile.", "Encore une ligne."),  # a duplicate of the first
    ("x", "Zu kurz.", "Trop court."),
    ("Blank German.", " \u00a0", "Blanc."),
    ("Alone.", "", ""),
]


def source(path: Path, **more) -> SourceConfig:
    return SourceConfig(type="parallel", path=str(path), columns=COLUMNS, **more)


def write_tsv(path: Path, rows) -> Path:
    path.write_text("\n".join("\t".join(row) for row in [COLUMNS, *rows]) + "\n", encoding="utf-8")
    return path


def prepare(config: TextConfig, out: Path, rows_per_chunk: int = 3):
    """The manifest, and (text, translations) of all chunks and of the held-out one."""
    manifest = prepare_text(config, out, rows_per_chunk=rows_per_chunk, num_buckets=4)
    chunks = [read_listed_chunk(out, entry) for entry in [*manifest["chunks"], manifest["held_out"]]]
    *kept, held_out = [list(zip(chunk.texts, *chunk.translations, strict=True)) for chunk in chunks]
    return manifest, [row for rows in kept for row in rows], held_out


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".csv", ".jsonl", ".parquet"])
def test_columns_of_every_kind_of_file_are_read_in_the_order_of_the_config(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [*ROWS, ('A "quoted", text', "Tab und mehr", "l'été")]
    if suffix.startswith(".tsv"):
        text = write_tsv(tmp_path / "plain", rows).read_bytes()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    elif suffix == ".csv":
        rows.append(("A\ttab", "two\nlines", ""))
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    elif suffix == ".jsonl":
        objects = [{name: text for name, text in zip(COLUMNS, row, strict=True) if text} for row in rows]
        path.write_text("".join(json.dumps(each) + "\n" for each in objects), encoding="utf-8")
    else:
        columns = [[row[column] or None for row in rows] for column in range(3)]
        pq.write_table(pa.table(dict(zip(COLUMNS, columns, strict=True))), path)
    assert list(read_translated(source(path))) == rows
    assert list(read_source(source(path, limit=2))) == ["One row.", "Without German."]
    swapped = source(path).model_copy(update={"columns": ["fr", "en"]})
    assert next(read_translated(swapped)) == ("Une ligne.", "One row.")
    with pytest.raises(ValueError, match="'nl'"):
        check_source(source(path).model_copy(update={"columns": ["en", "nl"]})) if suffix != ".jsonl" else list(
            read_translated(source(path).model_copy(update={"columns": ["nl", "en"]}))
        )


def test_a_source_of_parallel_text_names_its_columns_and_no_other_has_any():
    for changes, problem in (
        ({"columns": None}, "at least one other"),
        ({"columns": ["en"]}, "at least one other"),
        ({"columns": ["en", "en"]}, "each once"),
        ({"field": "en"}, "has no `field`"),
        ({"path": None}, "needs `path` and `columns`"),
        ({"type": "file"}, "`columns` is for a source of type parallel"),
        ({"columns": [str(number) for number in range(101)]}, "at most 100"),
    ):
        with pytest.raises(ValueError, match=problem):
            SourceConfig(**{"type": "parallel", "path": "x.tsv", "columns": ["en", "de"]} | changes)


def test_the_teachers_column_decides_and_what_is_dropped_or_untranslated_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "distill")
    config = TextConfig(sources=[source(write_tsv(tmp_path / "rows.tsv", ROWS))], min_chars=2, held_out=100)
    manifest, kept, held_out = prepare(config, tmp_path / "out")
    expected = [(ROWS[0]), ROWS[1], ("Blank German.", "", "Blanc."), ROWS[5]]
    is_kept = [not is_held_out(text_hash(row[0])) for row in expected]
    assert kept == [row for row, keep in zip(expected, is_kept, strict=True) if keep]
    assert sorted(held_out) == sorted(row for row, keep in zip(expected, is_kept, strict=True) if not keep)
    counts = {"read": 6, "duplicates": 1, "too_short": 1, "kept": len(kept), "held_out": len(held_out)}
    assert counts.items() <= manifest["counts"].items()
    described = manifest["sources"][0]
    assert described["untranslated"] == {"de": 3, "fr": 1} and described["columns"] == COLUMNS and "weight" not in described
    assert "rows.tsv: texts of en without a translation: de 3, fr 1" in caplog.text


def many_rows(count: int) -> list[tuple[str, str, str]]:
    return [(text, f"de: {text}" if number % 3 else "", f"fr: {text}") for number, text in enumerate(sentences(count))]


def test_held_out_texts_take_their_translations_with_them(tmp_path):
    rows = many_rows(800)
    _, kept, held_out = prepare(TextConfig(sources=[source(write_tsv(tmp_path / "r.tsv", rows))]), tmp_path / "out", 100)
    hashes = np.array([text_hash(row[0]) for row in rows])
    assert kept == [row for row, out in zip(rows, is_held_out(hashes), strict=True) if not out]
    assert set(held_out) == {row for row, out in zip(rows, is_held_out(hashes), strict=True) if out} and len(held_out) > 5


def test_a_plain_source_before_parallel_text_has_empty_translations(tmp_path):
    (tmp_path / "plain.txt").write_text("First.\nSecond.\n")
    sources = [SourceConfig(type="file", path=str(tmp_path / "plain.txt")), source(write_tsv(tmp_path / "rows.tsv", ROWS[:2]))]
    manifest, kept, held_out = prepare(TextConfig(sources=sources), tmp_path / "out")
    assert sorted(kept + held_out) == sorted([("First.", "", ""), ("Second.", "", ""), ROWS[0], ROWS[1]])
    assert "untranslated" not in manifest["sources"][0] and "columns" not in manifest["sources"][0]


def test_a_killed_call_continues_with_the_same_translations_and_counts(tmp_path, monkeypatch):
    config = TextConfig(sources=[source(write_tsv(tmp_path / "r.tsv", many_rows(2000)))])
    whole, *expected = prepare(config, tmp_path / "whole", 100)
    monkeypatch.setattr(spool, "BLOCK_ROWS", 50)
    monkeypatch.setattr(spool, "JOURNAL_EVERY", 7)
    read = []

    def failing(each):
        for row in read_translated(each):
            if len(read) == 1000:
                raise KeyboardInterrupt
            read.append(row)
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(spool, "read_translated", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tmp_path / "cut", 100)
    normalised = []
    monkeypatch.setattr(spool, "normal_form", lambda text: normalised.append(text) or normal_form(text))
    again, *found = prepare(config, tmp_path / "cut", 100)
    assert len(normalised) == 3 * (2000 - 1000 // 350 * 350), "what the journal covers is read again"
    assert (again, found) == (whole, expected)


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_changed_or_lost_translations_are_refused_by_name(tmp_path, harm):
    config = TextConfig(sources=[source(write_tsv(tmp_path / "r.tsv", many_rows(300)))])
    manifest, *_ = prepare(config, tmp_path / "out", 100)
    path = tmp_path / "out" / translation_name("000001", 2)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.unlink() if harm == "delete" else path.write_bytes(data)
    with pytest.raises(ValueError, match=r"000001\.translation02\.txt is not as it was written"):
        read_listed_chunk(tmp_path / "out", manifest["chunks"][1])


def test_other_translations_are_another_text(tmp_path):
    found = []
    for name, row in (("a", ROWS[0]), ("b", (ROWS[0][0], "Eine andere Zeile.", ROWS[0][2]))):
        (tmp_path / name).mkdir()
        manifest, *_ = prepare(
            TextConfig(sources=[source(write_tsv(tmp_path / name / "r.tsv", [row]))]), tmp_path / name / "out"
        )
        found.append((manifest["fingerprint"], chunk_fingerprint([*manifest["chunks"], manifest["held_out"]][0])))
        shutil.rmtree(tmp_path / name / "out")
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
