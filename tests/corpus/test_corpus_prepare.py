"""Text chunks against a simple in-memory reference, and guarantees that hold at any size."""

import gzip
import hashlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from distributed_ranks import on_ranks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distill.corpus import (
    can_resume,
    held_out_sources,
    normal_form,
    prepare_text,
    read_chunk,
    read_listed_chunk,
    spool,
    text_hash,
)
from distill.corpus.deduplication import deduplicate
from distill.corpus.sources import read_translated
from distill.corpus.text import stored
from distill.corpus.text_config import SourceConfig, TextConfig
from distill.run.files import read_json


def reference(texts, *, min_chars, max_chars, max_held_out):
    """(kept, held out), each a list of (raw row number, text)."""
    seen, kept, held_out = set(), [], []
    for row, text in enumerate(texts):
        form = normal_form(text)
        if min_chars <= len(form) <= max_chars and form not in seen:
            seen.add(form)
            (held_out if text_hash(text) % 2**64 % 50 == 0 else kept).append((row, stored(text)))
    held_out.sort(key=lambda pair: text_hash(pair[1]) % 2**64)
    return kept, held_out[:max_held_out]


def config_of(path, texts, **more):
    path.mkdir(parents=True, exist_ok=True)
    (path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextConfig(sources=[SourceConfig(type="file", path=str(path / "raw.jsonl"), field="text")], **more)


def prepare(config, out, *, rows_per_chunk=100, **more):
    return prepare_text(config, out, rows_per_chunk=rows_per_chunk, **more)


def chunks_of(out, manifest):
    return [read_chunk(out / f"{chunk['name']}.txt") for chunk in manifest["chunks"]]


def files_of(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def some_texts(count, seed=0):
    """Texts with many duplicates, some far apart, some differing in spaces alone, and some too short or too long."""
    numbers = np.random.default_rng(seed).integers(0, count // 2 + 1, count).tolist()
    return [("x" * 90 if n % 17 == 0 else "s") + f" {' ' * (row % 3)}number {n} é" for row, n in enumerate(numbers)] + [
        "short"
    ] * 3


LIMITS = {"min_chars": 10, "max_chars": 60}


@pytest.mark.parametrize("count", [60, 1000, 40_000])
def test_chunks_and_held_out_are_those_of_the_reference(tmp_path, count):
    texts = some_texts(count)
    manifest = prepare(config_of(tmp_path / "in", texts, held_out=7, **LIMITS), tmp_path / "out", keep_row_numbers=True)
    kept, held_out = reference(texts, max_held_out=7, **LIMITS)
    chunks = chunks_of(tmp_path / "out", manifest)
    assert [text for chunk in chunks for text in chunk] == [text for _, text in kept]
    assert read_chunk(tmp_path / "out/held_out.txt") == [text for _, text in held_out]
    rows = np.concatenate([np.load(tmp_path / f"out/{chunk['name']}.rows.npy") for chunk in manifest["chunks"]])
    assert rows.dtype == np.int64 and rows.tolist() == [row for row, _ in kept]
    assert np.load(tmp_path / "out/held_out.rows.npy").tolist() == [row for row, _ in held_out]
    assert [len(chunk) for chunk in chunks[:-1]] == [100] * (len(chunks) - 1) and 1 <= len(chunks[-1]) <= 100


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=4), min_size=1, max_size=120))
@example(texts=["0\x00", "a"])
def test_any_text_gives_what_the_reference_gives(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    kept, held_out = reference(texts, min_chars=1, max_chars=3, max_held_out=2)
    config = config_of(folder, texts, min_chars=1, max_chars=3, held_out=2)
    if not kept:
        with pytest.raises(ValueError, match="no text is left"):
            prepare(config, folder / "out")
        return
    manifest = prepare(config, folder / "out", rows_per_chunk=7)
    assert [text for chunk in chunks_of(folder / "out", manifest) for text in chunk] == [text for _, text in kept]
    assert read_chunk(folder / "out/held_out.txt") == [text for _, text in held_out]


def test_a_duplicate_far_apart_is_dropped_once(tmp_path):
    middle = [f"sentence number {number}" for number in range(50_000)]
    texts = ["this one comes twice", *middle, "this  one comes\ntwice"]
    manifest = prepare(config_of(tmp_path / "in", texts), tmp_path / "out", rows_per_chunk=100_000)
    (chunk,) = chunks_of(tmp_path / "out", manifest)
    assert manifest["counts"]["duplicates"] == 1
    assert chunk.count("this one comes twice") == 1 and chunk[0] == "this one comes twice"


def test_counts_and_lengths_add_up(tmp_path):
    texts = some_texts(3000)
    manifest = prepare(config_of(tmp_path / "in", texts, held_out=5, max_sentences=300, **LIMITS), tmp_path / "out")
    counts = manifest["counts"]
    assert counts["read"] == len(texts) == sum(value for key, value in counts.items() if key != "read")
    assert counts["too_short"] == 3 and counts["too_long"] == sum(len(normal_form(text)) > 60 for text in texts)
    assert counts["kept"] == 300 == sum(chunk["rows"] for chunk in manifest["chunks"])
    assert counts["held_out"] == 5 == manifest["held_out"]["rows"] and counts["held_out_unused"] > 0
    assert [source["count"] for source in manifest["sources"]] == [len(texts)]
    lengths = [len(text) for chunk in chunks_of(tmp_path / "out", manifest) for text in chunk]
    histogram = manifest["lengths"].pop("histogram")
    edges = [histogram["from"] - 1, *histogram["upto"]]
    assert histogram["counts"] == [sum(low < size <= high for size in lengths) for low, high in pairwise(edges)]
    assert sum(histogram["counts"]) == 300 and histogram["from"] == min(lengths)
    assert manifest["lengths"] == {
        "mean_chars": round(float(np.mean(lengths)), 2),
        "p50": int(np.percentile(lengths, 50, method="inverted_cdf")),
        "p95": int(np.percentile(lengths, 95, method="inverted_cdf")),
        "max": max(lengths),
    }


def test_the_manifest_describes_every_file_and_no_other_is_left(tmp_path):
    out = tmp_path / "out"
    manifest = prepare(config_of(tmp_path / "in", some_texts(1000), **LIMITS), out)
    assert read_json(out / "manifest.json") == manifest
    described = [*manifest["chunks"], manifest["held_out"]]
    written = {f"{file['name']}.{suffix}" for file in described for suffix in ("txt", "sources.npy")}
    assert {path.name for path in out.iterdir()} == {"manifest.json", *written}
    for file in described:
        data = (out / f"{file['name']}.txt").read_bytes()
        assert (file["bytes"], file["sha256"], file["rows"]) == (len(data), hashlib.sha256(data).hexdigest(), data.count(b"\n"))
    digests = "".join(file["sha256"] for file in described)
    assert manifest["fingerprint"] == hashlib.sha256(digests.encode()).hexdigest()


def test_no_held_out_text_is_in_a_chunk(tmp_path):
    texts = [f"sentence number {number}" for number in range(5000)]
    manifest = prepare(config_of(tmp_path / "in", texts, held_out=0), tmp_path / "out")
    kept = {text for chunk in chunks_of(tmp_path / "out", manifest) for text in chunk}
    assert read_chunk(tmp_path / "out/held_out.txt") == []
    assert kept == {text for text in texts if text_hash(text) % 2**64 % 50}


def test_chunks_do_not_depend_on_bucket_count(tmp_path):
    config = config_of(tmp_path / "in", some_texts(20_000), max_sentences=4000, **LIMITS)
    for num_buckets in (1, 3, 64, 256):
        prepare(config, tmp_path / str(num_buckets), num_buckets=num_buckets, keep_row_numbers=True)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3") == files_of(tmp_path / "64") == files_of(tmp_path / "256")


def test_a_sample_is_exact_the_same_in_any_order_and_holds_smaller_samples(tmp_path):
    texts = [f"sentence number {number}" for number in range(20_000)]
    samples = {}
    for name, ordered, size in [("a", texts, 3000), ("b", texts[::-1], 3000), ("c", texts, 1000), ("d", texts, 10**9)]:
        manifest = prepare(
            config_of(tmp_path / name, ordered, max_sentences=size), tmp_path / name / "out", rows_per_chunk=10**6
        )
        samples[name] = chunks_of(tmp_path / name / "out", manifest)[0]
    assert len(samples["a"]) == 3000 and samples["a"] == samples["b"][::-1]
    assert len(samples["c"]) == 1000 and set(samples["c"]) < set(samples["a"]) < set(samples["d"])
    in_the_first_half = sum(int(text.split()[-1]) < 10_000 for text in samples["a"])
    assert 1350 < in_the_first_half < 1650


def test_texts_are_kept_as_they_are_and_nothing_but_empty_texts_is_dropped_unasked(tmp_path):
    texts = [
        "def f(x):\r\n\treturn x\n",
        "  indented\u200b e\u0301",
        "| a | b |\n|---|---|\n",
        "好",
        "x" * 90_000,
        "",
        " \n ",
        "\u200b",
    ]
    manifest = prepare(config_of(tmp_path / "in", texts, held_out=9), tmp_path / "out")
    held_out = read_chunk(tmp_path / "out/held_out.txt")
    assert sorted([*held_out, *chunks_of(tmp_path / "out", manifest)[0]]) == sorted(texts[:5])
    assert manifest["counts"]["too_short"] == 3 and manifest["counts"]["too_long"] == 0 and manifest["normal_form"] == 2


def test_a_text_with_nothing_left_is_refused_with_its_counts_and_leaves_nothing(tmp_path):
    config = config_of(tmp_path / "in", ["short", "", "x" * 5000], min_chars=12, max_chars=1000)
    with pytest.raises(
        ValueError, match=r"no text is left.* 3 texts read.* 2 shorter than text\.min_chars = 12, 1 longer.*raw"
    ):
        prepare(config, tmp_path / "out")
    with pytest.raises(ValueError, match="0 texts read"):
        prepare(config_of(tmp_path / "in", []), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_source_leaves_no_manifest_and_no_spool(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a good sentence here\n" * 50_000 + b"\xff\n")
    with pytest.raises(ValueError, match="line 50001: not UTF-8"):
        prepare(TextConfig(sources=[SourceConfig(type="file", path=str(tmp_path / "a.txt"))]), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_mistake_in_the_last_source_is_found_before_any_work(tmp_path):
    good = SourceConfig(type="file", path=str(config_of(tmp_path, ["a good sentence"]).sources[0].path), field="text")
    for bad in (good.model_copy(update={"field": "sentence"}), good.model_copy(update={"path": "nowhere.txt"})):
        with pytest.raises(ValueError, match=r"'sentence'|nowhere\.txt"):
            prepare(TextConfig(sources=[good, bad]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_attempt_left_is_not_read(tmp_path):
    config = config_of(tmp_path / "in", some_texts(500), **LIMITS)
    prepare(config, tmp_path / "fresh")
    (tmp_path / "again/spool.part").mkdir(parents=True)
    (tmp_path / "again/spool.part/bucket.000").write_bytes(b"x" * 1600)
    prepare(config, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "fresh")


def test_lines_of_a_chunk_end_at_newlines_only_and_a_truncated_chunk_is_refused(tmp_path):
    path = tmp_path / "000000.txt"
    path.write_bytes("one \u2028 line\nanother\x0b\x85 line\n".encode())
    assert read_chunk(path) == ["one \u2028 line", "another\x0b\x85 line"]
    path.write_bytes(b"one\ntw")
    with pytest.raises(ValueError, match="cut off"):
        read_chunk(path)


PEAK_MEMORY = """
import re, sys
from pathlib import Path
from distill.run.files import read_json
from distill.corpus.text import stored
from distill.corpus.text_config import TextConfig
from distill.corpus import prepare_text
folder = Path(sys.argv[1])
prepare_text(TextConfig(sources=[{"type": "file", "path": str(folder / "raw.txt.gz")}]), folder / "out", rows_per_chunk=65_536)
# not getrusage: its maximum is at first that of the process which forked this one
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks = []
    for count in (150_000, 1_000_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        with gzip.open(folder / "raw.txt.gz", "wt", compresslevel=1) as file:
            file.writelines(f"the sentence of number {number} is like all the others\n" for number in range(count))
        ran = subprocess.run([sys.executable, "-c", PEAK_MEMORY, folder], capture_output=True, text=True, check=True)
        assert ran.stderr == ""
        peaks.append(int(ran.stdout))
    assert peaks[1] < 250 and peaks[1] - peaks[0] < 30


@pytest.mark.parametrize("cut_after", [1, 30, 64])
def test_a_killed_call_continues_from_its_journal_and_writes_the_same_chunks(tmp_path, monkeypatch, cut_after):
    texts = some_texts(6000)
    config = TextConfig(
        sources=[config_of(tmp_path / name, part).sources[0] for name, part in (("a", texts[:2500]), ("b", texts[2500:]))],
        **LIMITS,
    )
    prepare(config, tmp_path / "whole", keep_row_numbers=True)
    monkeypatch.setattr(spool, "BLOCK_ROWS", 50)
    monkeypatch.setattr(spool, "JOURNAL_EVERY", 7)
    read = []

    def counting(source):
        for text in read_translated(source):
            if len(read) == cut_after * 50:
                raise KeyboardInterrupt
            read.append(text)
            yield text

    monkeypatch.setattr(spool, "read_translated", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "cut", keep_row_numbers=True)
    assert can_resume(tmp_path / "cut") is (cut_after >= 7)
    normalised = []
    monkeypatch.setattr(spool, "read_translated", read_translated)
    monkeypatch.setattr(spool, "normal_form", lambda text: normalised.append(text) or normal_form(text))
    prepare(config, tmp_path / "cut", keep_row_numbers=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    of_a = set(map(normal_form, texts[:2500]))  # the first of equal sentences stays
    expected = [
        "1 raw.jsonl text" if normal_form(text) in of_a else "2 raw.jsonl text"
        for text in read_chunk(tmp_path / "cut/held_out.txt")
    ]
    assert held_out_sources(tmp_path / "cut") == expected and len(set(expected)) == 2
    assert len(normalised) == len(texts) - cut_after // 7 * 7 * 50, "what the journal covers is read again"


def cut_off(config, out, monkeypatch, *, after):
    """A `prepare_text` that ends after `after` raw texts, with a journal."""

    def failing(source):
        for number, text in enumerate(read_translated(source)):
            if number == after:
                raise KeyboardInterrupt
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(spool, "BLOCK_ROWS", 50)
        patch.setattr(spool, "JOURNAL_EVERY", 7)
        patch.setattr(spool, "read_translated", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, out, keep_row_numbers=True, num_buckets=4)
    assert can_resume(out)


def shorten(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def garble(path):
    path.write_bytes(b'{"of": ')


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("texts", shorten, r"texts has \d+ of the \d+ bytes"),
        ("rows", shorten, r"rows has \d+ of the \d+ bytes"),
        ("bucket.002", shorten, r"bucket\.002 has \d+ of the \d+ bytes"),
        ("bucket.001", os.unlink, r"bucket\.001 is missing"),
        ("texts", flip, r"texts does not match its checksum"),
        ("bucket.003", flip, r"bucket\.003 does not match its checksum"),
        ("journal.json", garble, r"journal\.json is damaged"),
    ],
)
def test_damaged_working_files_are_named_once_and_the_text_is_read_again(tmp_path, monkeypatch, caplog, name, harm, message):
    config = config_of(tmp_path / "in", some_texts(2000), **LIMITS)
    prepare(config, tmp_path / "whole", keep_row_numbers=True)
    cut_off(config, tmp_path / "cut", monkeypatch, after=1500)
    harm(tmp_path / "cut/spool.part" / name)
    with caplog.at_level(logging.WARNING):
        prepare(config, tmp_path / "cut", keep_row_numbers=True, num_buckets=4)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.search(message + ".* (the sources are read|it is made) again", record.getMessage())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_texts_of_two_versions_of_the_sources_are_never_mixed(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    config = TextConfig(sources=[str(folder / "*.txt")], **LIMITS)
    for name, change in {
        "edited": lambda: (folder / "a.txt").write_text("a sentence of the other version\n" * 3),
        "removed": lambda: (folder / "a.txt").unlink(),
        "added": lambda: (folder / "0.txt").write_text("a sentence of a further file\n"),
    }.items():
        for path in folder.iterdir():
            path.unlink()
        for number, file in enumerate("ab"):
            (folder / f"{file}.txt").write_text("".join(f"{text}\n" for text in some_texts(1000, seed=number)))
        cut_off(config, tmp_path / name, monkeypatch, after=1500)
        change()
        prepare(config, tmp_path / f"{name}-whole", keep_row_numbers=True)
        caplog.clear()
        prepare(config, tmp_path / name, keep_row_numbers=True, num_buckets=4)
        assert "the working files are of other sources" in caplog.text
        assert files_of(tmp_path / name) == files_of(tmp_path / f"{name}-whole")


def test_a_source_that_was_only_touched_is_continued(tmp_path, monkeypatch, caplog):
    config = config_of(tmp_path / "in", some_texts(2000), **LIMITS)
    cut_off(config, tmp_path / "out", monkeypatch, after=1500)
    os.utime(tmp_path / "in/raw.jsonl", (0, 0))
    prepare(config, tmp_path / "out", keep_row_numbers=True, num_buckets=4)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_dropped_is_reported_with_the_key_that_changes_it(tmp_path, caplog):
    config = config_of(tmp_path / "in", some_texts(3000), held_out=5, max_sentences=300, **LIMITS)
    with caplog.at_level(logging.INFO):
        counts = prepare(config, tmp_path / "out")["counts"]
    assert caplog.messages == [
        f"text: 3,003 texts read, 300 kept, 5 held out for evaluation; dropped: 3 shorter than text.min_chars = 10,"
        f" {counts['too_long']} longer than text.max_chars = 60, {counts['duplicates']:,} duplicates,"
        f" {counts['not_sampled']:,} not in the sample of text.max_sentences = 300,"
        f" {counts['held_out_unused']} held out beyond text.held_out = 5"
    ]


def change_a_number(path):
    numbers = np.load(path)
    numbers[0] += 1
    np.save(path, numbers)


@pytest.mark.parametrize("harm", [change_a_number, os.unlink])
def test_changed_or_lost_row_numbers_are_refused_by_name(tmp_path, harm):
    manifest = prepare(config_of(tmp_path / "in", some_texts(500), **LIMITS), tmp_path / "out", keep_row_numbers=True)
    entry = manifest["chunks"][1]
    texts, numbers, *_ = read_listed_chunk(tmp_path / "out", entry)
    assert len(texts) == len(numbers) == entry["rows"]
    harm(tmp_path / "out/000001.rows.npy")
    with pytest.raises(ValueError, match=r"000001\.rows\.npy is not as it was written .*: delete .*out to prepare"):
        read_listed_chunk(tmp_path / "out", entry)


def test_changed_sources_of_held_out_texts_are_refused_by_name(tmp_path):
    prepare(config_of(tmp_path / "in", some_texts(500), **LIMITS), tmp_path / "out")
    assert held_out_sources(tmp_path / "out")
    change_a_number(tmp_path / "out/held_out.sources.npy")
    with pytest.raises(ValueError, match=r"held_out\.sources\.npy is not as it was written"):
        held_out_sources(tmp_path / "out")


def deduplicate_with_little_space(written):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="File too large") as error:
        deduplicate(written, 100_000, 0, None)
    return error.value.filename


def test_space_for_the_statuses_of_all_texts_is_taken_before_they_are_mapped(tmp_path):
    written = spool.Spool(tmp_path, 1, has_rows=False)
    np.array([(7, 99_999)], spool.RECORD).tofile(written.buckets[0])
    assert on_ranks(1, deduplicate_with_little_space, written) == [str(written.statuses)]
    counts, _ = deduplicate(written, 100_000, 0, None)
    assert counts["kept"] == 1 and written.statuses.stat().st_blocks * 512 >= 100_000
