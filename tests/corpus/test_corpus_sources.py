"""Every kind of file reads the same, and every kind of damage has its message."""

import csv
import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from distill.corpus import read_rows, read_source, sources
from distill.corpus.sources import pinned, source_files, source_fingerprints
from distill.corpus.text_config import SourceConfig, TextConfig
from distill.run.files import DigestCache

TEXTS = [
    'She said "no", twice.',
    "Größe zählt nicht.",
    "",
    'A "quote that is open.',
    "three, commas, here",
    "\u2028 splits no line",
]
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def write(path, data, packing=""):
    path = path.with_name(path.name + packing)
    path.write_bytes(PACKERS[packing](data))
    return path


def tsv(texts):
    return "".join(f"{row}\n" for row in ["id\ttext", *(f"{number}\t{text}" for number, text in enumerate(texts))]).encode()


def jsonl(texts):
    return "".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)).encode()


def csv_bytes(tmp_path, texts):
    with (tmp_path / "made").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    return (tmp_path / "made").read_bytes()


def read(path, field=None, **more):
    return list(read_source(SourceConfig(type="file", path=str(path), field=field, **more)))


@pytest.mark.parametrize("packing", PACKERS)
def test_every_format_and_compression_reads_the_same(tmp_path, packing):
    lines = "".join(f"{text}\n" for text in TEXTS).encode()
    assert read(write(tmp_path / "a.txt", lines, packing)) == TEXTS
    assert read(write(tmp_path / "a.tsv", tsv(TEXTS), packing), "text") == TEXTS
    assert read(write(tmp_path / "a.csv", csv_bytes(tmp_path, TEXTS), packing), "text") == TEXTS
    assert read(write(tmp_path / "a.jsonl", jsonl(TEXTS), packing), "text") == TEXTS


def test_parquet_reads_strings_of_every_encoding_and_nulls_as_empty(tmp_path):
    texts = pa.array(["one", None, "three"])
    table = pa.table({"plain": texts, "large": texts.cast(pa.large_string()), "coded": texts.dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for field in table.column_names:
        assert read(tmp_path / "a.parquet", field) == ["one", "", "three"]


def test_rows_come_in_the_order_of_the_fields_asked_for(tmp_path):
    for path in (write(tmp_path / "a.tsv", tsv(["x", "y"])), write(tmp_path / "a.jsonl", jsonl(["x", "y"]))):
        assert list(read_rows(str(path), ["text", "id", "text"])) == [("x", "0", "x"), ("y", "1", "y")]
    pq.write_table(pa.table({"id": ["0", "1"], "text": ["x", "y"]}), tmp_path / "a.parquet")
    assert list(read_rows(str(tmp_path / "a.parquet"), ["text", "id"])) == [("x", "0"), ("y", "1")]


def test_a_quoted_csv_field_may_span_lines_and_crlf_and_a_byte_order_mark_are_no_text(tmp_path):
    path = write(tmp_path / "a.csv", b'\xef\xbb\xbftext,id\r\n"two\nlines",1\r\nplain,2\r\n')
    assert read(path, "text") == ["two\nlines", "plain"]
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo")) == ["one", "two"]


def test_several_compressed_members_are_one_file(tmp_path):
    for packing in (".gz", ".zst"):
        path = tmp_path / f"a.txt{packing}"
        path.write_bytes(PACKERS[packing](b"one\ntw") + PACKERS[packing](b"") + PACKERS[packing](b"o\nthree\n"))
        assert read(path) == ["one", "two", "three"]


def test_a_glob_reads_its_files_sorted_and_a_source_ends_at_its_limit(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", f"{name}1\n{name}2\n".encode())
    assert read(tmp_path / "*.txt", limit=3) == ["a1", "a2", "b1"]
    assert read(tmp_path / "c.txt", limit=1) == ["c1"]


def test_a_file_name_with_brackets_is_that_file(tmp_path):
    assert read(write(tmp_path / "a[1].txt", b"one\n")) == ["one"]
    (tmp_path / "set [1]").mkdir()
    write(tmp_path / "set [1]" / "b.txt", b"two\n")
    assert read(tmp_path / "set [1]" / "*.txt") == read(tmp_path / "set [1]" / "**/*.txt") == ["two"]
    assert read(tmp_path / "*[[]1]" / "?.txt") == ["two"]


def test_a_file_is_read_lazily(tmp_path):
    path = write(tmp_path / "a.txt", b"fine\n" * 100_000 + b"\xff\n")
    source = read_source(SourceConfig(type="file", path=str(path)))
    assert list(itertools.islice(source, 5)) == ["fine"] * 5


@pytest.mark.parametrize("packing", PACKERS)
def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path, packing):
    path = write(tmp_path / "latin.txt", "good\nalso good\nGröße\n".encode("latin-1"), packing)
    with pytest.raises(ValueError, match=rf"latin\.txt{packing}, line 3: not UTF-8 \(byte 0xf6 at column 3\)"):
        read(path)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_cut_off_or_damaged_compressed_file_is_an_error(tmp_path, packing):
    path = write(tmp_path / "a.txt", "".join(f"line {number * 7919}\n" for number in range(50_000)).encode(), packing)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.txt.*cannot be read after line"):
        read(path)
    path.write_bytes(b"no such format" + whole)
    with pytest.raises(ValueError, match=r"a\.txt.*cannot be read \("):
        read(path)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    with pytest.raises(ValueError, match="line 2: longer than"):
        read(write(tmp_path / "a.txt", b"x\n" + b"a" * (1 << 25), ".gz"))


def test_a_missing_column_is_named_with_the_known_ones(tmp_path):
    pq.write_table(pa.table({"id": ["0"], "text": ["x"]}), tmp_path / "a.parquet")
    csv_path = write(tmp_path / "a.csv", csv_bytes(tmp_path, ["x"]))
    for path in (
        write(tmp_path / "a.tsv", tsv(["x"])),
        csv_path,
        write(tmp_path / "a.jsonl", jsonl(["x"])),
        tmp_path / "a.parquet",
    ):
        with pytest.raises(ValueError, match=rf"{path.name}.*'sentence'.* are id, text"):
            read(path, "sentence")
        with pytest.raises(ValueError, match="needs `field`; its fields are id, text"):
            read(path)


LISTS = [["one picture", "the same picture"], [], ["another", None]]
LISTED = ["one picture", "the same picture", "another", ""]


def test_each_string_of_a_list_is_read(tmp_path):
    lines = "".join(json.dumps({"captions": texts, "id": "x"}) + "\n" for texts in LISTS).encode()
    assert read(write(tmp_path / "a.jsonl", lines), "captions") == LISTED
    pq.write_table(pa.table({"captions": LISTS}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "captions") == LISTED
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"captions": LISTS}), tmp_path / "set/train.parquet")
    found = SourceConfig(type="huggingface", name=str(tmp_path / "set"), field="captions", limit=3)
    assert list(read_source(found)) == LISTED[:3]


def test_a_list_of_anything_else_or_beside_another_field_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"captions": ["x", 5], "id": "x"}\n')
    with pytest.raises(ValueError, match="line 1, field 'captions': expected a string, found int '5'"):
        read(path, "captions")
    with pytest.raises(ValueError, match="expected a string, found list"):
        list(read_rows(str(path), ["captions", "id"]))


def test_a_field_for_a_txt_is_refused(tmp_path):
    with pytest.raises(ValueError, match="remove `field`"):
        read(write(tmp_path / "a.txt", b"x\n"), "text")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1: JSON, but no object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1, field 'text': expected a string, found int '5'"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON"),
        ("a.tsv", b"id\ttext\n1\tx\n2\n", "line 3: 1 columns where the header has 2"),
        ("a.csv", b"id,text\n1,x, y\n", "line 2: 3 columns where the header has 2"),
        ("a.csv", b'id,text\n1,"open\n', "not valid csv"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.docx", b"", "unknown kind of file; known are .txt"),
        ("a", b"", "unknown kind of file"),
        ("a.parquet.gz", b"", "unpack it"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message) as error:
        read(path, "text")
    assert str(path) in str(error.value)


def test_a_path_that_names_nothing_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.txt' names no file"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="is a folder; add a glob"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read .*No such file"):
        list(read_rows(str(tmp_path / "nothing.txt"), []))


def test_a_csv_field_may_be_longer_than_python_s_own_limit(tmp_path):
    text = "word " * 40_000
    assert read(write(tmp_path / "a.csv", csv_bytes(tmp_path, [text])), "text") == [text]


@pytest.mark.parametrize("end", ["tsv", "csv", "parquet"])
def test_a_name_of_two_columns_is_refused_and_others_beside_it_are_read(tmp_path, end):
    path = tmp_path / f"a.{end}"
    if end == "parquet":
        arrays = [pa.array([value]) for value in ("one", "two", "three")]
        pq.write_table(pa.Table.from_arrays(arrays, names=["text", "text", "other"]), path)
    else:
        tab = "\t" if end == "tsv" else ","
        path.write_text("".join(f"{tab.join(row)}\n" for row in (("text", "text", "other"), ("one", "two", "three"))))
    with pytest.raises(ValueError, match=rf"a\.{end}: 2 columns are called 'text'; rename"):
        read(path, "text")
    assert read(path, "other") == ["three"]


def test_bytes_of_parquet_are_decoded(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["Größe".encode()]), "bad": pa.array([b"\xff"])}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "text") == ["Größe"]
    with pytest.raises(ValueError, match=r"a\.parquet, column 'bad': bytes that are not UTF-8"):
        read(tmp_path / "a.parquet", "bad")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.parquet"])
def test_a_git_lfs_pointer_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        read(tmp_path / name, "text" if name.endswith("parquet") else None)


@pytest.mark.parametrize("path", ["pipe:touch ran", "https://example.com/a.txt", "s3://bucket/a.txt", "file:///etc/hosts"])
def test_a_command_or_url_is_refused_and_never_run(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="only local files are read"):
        read(path)
    with pytest.raises(ValueError, match="only local files are read"):
        list(read_source(SourceConfig(type="huggingface", name=path, field="text")))
    assert not list(tmp_path.iterdir())


def test_a_dataset_in_a_folder_is_read_by_name_in_order(tmp_path):
    write(tmp_path / "train.jsonl", jsonl([f"sentence {number}" for number in range(2500)]))
    source = SourceConfig(type="huggingface", name=str(tmp_path), field="text", limit=2300)
    assert list(read_source(source)) == [f"sentence {number}" for number in range(2300)]


def test_a_dataset_without_the_field_or_the_split_is_named(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(["x"]))
    with pytest.raises(ValueError, match="no field 'sentence'; its fields are id, text"):
        list(read_source(SourceConfig(type="huggingface", name=str(tmp_path), field="sentence")))
    with pytest.raises(ValueError, match=r"cannot read the Hugging Face dataset.*split dev"):
        list(read_source(SourceConfig(type="huggingface", name=str(tmp_path), field="text", split="dev")))


def test_a_dataset_with_a_script_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ValueError, match="cannot read the Hugging Face dataset"):
        list(read_source(SourceConfig(type="huggingface", name=str(tmp_path / "set"), field="text")))
    assert not marker.exists()


@pytest.mark.parametrize("pattern", ["a[[]1[]].txt", "a[1].txt", "*.txt", "**/*.txt"])
def test_source_files_are_those_that_are_read(tmp_path, pattern):
    for name in ("a[1].txt", "b.txt", ".hidden.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    found = source_files(TextConfig(sources=[str(tmp_path / pattern)]))
    assert [path.name for path in found] == read(tmp_path / pattern)
    assert found and ".hidden.txt" not in read(tmp_path / pattern)


def test_a_dataset_is_identified_by_its_content_in_a_folder_and_by_its_commit_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "dataset_commit", {"owner/set": "c0ffee", "owner/gone": ""}.get)

    def identify(name, revision=None):
        source = {"type": "huggingface", "name": name, "field": "text", "revision": revision}
        return source_fingerprints(TextConfig(sources=[source]), DigestCache(tmp_path / "digests.json"))[name]

    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", jsonl(["x"]))
    before = identify(str(folder))
    assert before and before == identify(str(folder))
    write(folder / "train.jsonl", jsonl(["other"]))
    assert identify(str(folder)) != before
    assert (identify("owner/set"), identify("owner/set", "abc"), identify("owner/gone")) == ("c0ffee", "abc", "")


@pytest.mark.parametrize("recorded", ["", "c0ffee"])
def test_what_was_recorded_of_a_dataset_without_a_revision_stays(tmp_path, monkeypatch, recorded):
    monkeypatch.setattr(sources, "dataset_commit", {"owner/set": "decade"}.get)
    source = {"type": "huggingface", "name": "owner/set", "field": "text"}
    digests, earlier = DigestCache(tmp_path / "digests.json"), {"owner/set": recorded}
    assert source_fingerprints(TextConfig(sources=[source]), digests, earlier) == earlier
    named = TextConfig(sources=[source | {"revision": "v2"}])
    assert source_fingerprints(named, digests, earlier) == {"owner/set": "v2"}


def test_a_commit_that_was_recorded_is_the_one_that_is_read(tmp_path):
    hub = {"type": "huggingface", "field": "text"}
    entries = [{**hub, "name": "owner/set"}, {**hub, "name": "owner/new"}, {**hub, "name": "owner/set", "revision": "v2"}]
    config = TextConfig(sources=[*entries, {**hub, "name": str(tmp_path)}])
    found = pinned(config, {"owner/set": "c0ffee", str(tmp_path): "a digest"})
    assert [source.revision for source in found.sources] == ["c0ffee", None, "v2", None]
