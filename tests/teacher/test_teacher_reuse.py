"""A set that takes vectors from other runs is the set of a teacher that embeds everything, and only the rest is embedded."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from commands import call
from conftest import make_encoder, sentences
from encoders import save_sentence_transformer
from faults.file_calls import kill_at

from distill.config import load_config, open_run, stage_of
from distill.run.files import read_json, read_lines
from distill.shards import ShardError, ShardReader, repair, verify_all
from distill.teacher.load import load_model

CPU = torch.device("cpu")
ONE_BIT = 2**-11  # of a float16 in [0.5, 1)
TEXTS, MORE = sentences(500)[:400], sentences(500)[400:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Encoders a, b and c of different widths, the texts old.txt and more.txt, and a run `old` of a and old.txt."""
    folder = tmp_path_factory.mktemp("reuse")
    for seed, (name, width) in enumerate({"a": 32, "b": 16, "c": 24}.items()):
        make_encoder(folder / name, width=width, seed=seed, layers=1)
    write_lines(folder / "old.txt", TEXTS)
    write_lines(folder / "more.txt", MORE)
    embed(config_of(folder, "old", ["old.txt"]))
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """The folder with a run `both` of the encoders a and b, with the weights 2 and 1, and old.txt."""
    embed(config_of(folder, "both", ["old.txt"], teacher_of(folder, "a", "b", weights=(2, 1)), ["old"]))
    return folder


def write_lines(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts))


def encoder(folder, name, **settings):
    return {"model": str(folder / name), "pooling": "mean", "max_length": 32, **settings}


def teacher_of(folder, *names, weights=(None, None, None)):
    first, *others = [encoder(folder, name, weight=weight) for name, weight in zip(names, weights, strict=False)]
    return {**first, "concat": others, "precision": "fp32"}


def config_of(folder, name, sources, teacher=None, reuse=(), rows=100, **text):
    """The config of a run; sources: names of files in `folder`, or {path: .., role: ..}."""
    given = [{"type": "file", **(source if isinstance(source, dict) else {"path": source})} for source in sources]
    tree = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "text": {"sources": [{**source, "path": str(folder / source["path"])} for source in given], **text},
        "teacher": teacher or teacher_of(folder, "a"),
        "shards": {"rows": rows, "block_rows": 32, "reuse": list(reuse)},
        "student": {"init": str(folder / "a")},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(tree))
    return load_config(folder / f"{name}.yaml")


def embed(config):
    """Runs precompute; returns the texts that were embedded, and those that were reused."""
    assert stage_of(config, "precompute").run(CPU)
    return counts(config)


def counts(config):
    tasks = read_lines(config.precompute_dir / "tasks.jsonl")
    return sum(task["texts"] for task in tasks), sum(task["reused"] for task in tasks)


def digests(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sets_of(config):
    return [ShardReader(config.shards_dir), ShardReader(config.shards_dir / "held_out")]


def check_equal(found, expected, tolerance=ONE_BIT):
    """Whether two finished runs have the same texts in the same order, the same manifests, and vectors within the tolerance."""
    for one, other in zip(sets_of(found), sets_of(expected), strict=True):
        rows = np.arange(len(other))
        assert one.texts(rows) == other.texts(rows) and one.hashes(rows).tolist() == other.hashes(rows).tolist()
        assert one.sources(rows).tolist() == other.sources(rows).tolist()
        assert np.abs(one.vectors(rows) - other.vectors(rows)).max() <= tolerance
        assert one.manifest.recipe() == other.manifest.recipe()
    text = [read_json(config.precompute_dir / "text/manifest.json") for config in (found, expected)]
    assert text[0] == text[1]
    assert verify_all(found.shards_dir) == [] == verify_all(found.shards_dir / "held_out")


@pytest.mark.parametrize(
    ("num_old", "num_more"), [(2000, 500), pytest.param(20_000, 5000, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_a_set_that_is_extended_embeds_the_new_texts_alone(folder, tmp_path, num_old, num_more):
    shutil.copytree(folder / "a", tmp_path / "a")
    texts = sentences(num_old + num_more)
    write_lines(tmp_path / "old.txt", texts[:num_old])
    write_lines(tmp_path / "more.txt", texts[num_old:] + texts[:num_old:9])  # some of the old ones again
    old = config_of(tmp_path, "old", ["old.txt"], rows=num_more)
    assert embed(old) == (num_old, 0)
    before = digests(old.run_dir)
    both = ["old.txt", "more.txt"]
    new = config_of(tmp_path, "new", both, reuse=["old"], rows=num_more)
    assert embed(new) == (num_more, num_old)
    assert digests(old.run_dir) == before
    whole = config_of(tmp_path, "whole", both, rows=num_more)
    assert embed(whole) == (num_old + num_more, 0)
    check_equal(new, whole)
    num_whole = len(sets_of(old)[0]) // num_more  # shards of reused texts alone
    digests_of = [[entry.sha256 for entry in sets_of(config)[0].manifest.shards[:num_whole]] for config in (new, whole)]
    assert digests_of[0] == digests_of[1] and num_whole >= 3
    shutil.rmtree(old.run_dir)
    assert stage_of(new, "precompute").reason_to_run() is None and stage_of(new, "precompute").refusal() is None
    assert embed(new) == (num_more, num_old)


@pytest.mark.slow
def test_texts_are_found_wherever_they_are_in_several_runs(folder):
    embed(config_of(folder, "more", ["more.txt"]))
    sources = ["more.txt", "old.txt"]
    new = config_of(folder, "shuffled", sources, reuse=[str(folder / "runs/more"), "old"], max_sentences=450)
    found, num_texts = embed(new), sum(map(len, sets_of(new)))
    assert found == (0, num_texts) and 450 < num_texts < 500
    whole = config_of(folder, "shuffled-whole", sources, max_sentences=450)
    embed(whole)
    check_equal(new, whole)


def test_held_out_texts_are_reused_where_their_number_changes(folder):
    of_old = [len(reader) for reader in sets_of(config_of(folder, "old", ["old.txt"]))]
    assert of_old[1] > 5
    few = config_of(folder, "few", ["old.txt"], held_out=3, reuse=["old"])
    assert embed(few) == (0, of_old[0] + 3)
    more = config_of(folder, "many", ["old.txt"], held_out=5, reuse=["few"])
    assert embed(more) == (2, of_old[0] + 3)


def test_a_text_of_other_bytes_is_embedded_again(folder):
    changed = [text.replace(" ", "  ", 1) for text in TEXTS[:50]]  # of the same normal form
    write_lines(folder / "changed.txt", [*changed, *TEXTS])
    lines = [json.dumps({"text": text.replace(" ", "\n", 1)}) for text in TEXTS[50:80]]
    write_lines(folder / "broken.jsonl", lines)
    broken = {"path": "broken.jsonl", "field": "text"}
    new = config_of(folder, "changed", [broken, "changed.txt"], reuse=["old"])
    assert embed(new) == (80, len(TEXTS) - 80)
    texts = {text for reader in sets_of(new) for text in reader.texts(range(len(reader)))}
    assert set(changed) <= texts and TEXTS[0] not in texts and TEXTS[50].replace(" ", "\n", 1) in texts


def test_a_text_with_another_prompt_is_embedded_again(folder, tmp_path):
    save_sentence_transformer(folder / "a", tmp_path / "prompted", prompts={"query": "find the: "})
    for number, name in enumerate(("plain", "asked", "given")):
        write_lines(tmp_path / f"{name}.txt", TEXTS[50 * number : 50 * (number + 1)])
    teacher = {"model": str(tmp_path / "prompted"), "precision": "fp32"}
    plain, asked, given = ({"path": f"{name}.txt"} for name in ("plain", "asked", "given"))
    before = [plain, {**asked, "role": "query"}, {**given, "prompt": "the "}]
    assert embed(config_of(tmp_path, "old", before, teacher)) == (150, 0)
    now = [{**asked, "role": "query"}, {**plain, "role": "query"}, {**given, "role": "query", "prompt": "the "}]
    new, whole = (config_of(tmp_path, name, now, teacher, reuse) for name, reuse in (("new", ["old"]), ("whole", [])))
    assert embed(new) == (50, 100)  # a prompt replaces that of the role
    embed(whole)
    check_equal(new, whole)
    text = TEXTS[3]  # of plain.txt
    vectors = [vector_of(text, sets_of(load_config(tmp_path / f"{name}.yaml"))[0]) for name in ("old", "new")]
    assert np.abs(vectors[0] - vectors[1]).max() > 10 * ONE_BIT


def vector_of(text, reader):
    return reader.vectors([reader.texts(range(len(reader))).index(text)])


def flip(path, position=9000):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_a_damaged_shard_of_the_reused_run_is_named_and_none_of_its_vectors_is_taken(folder, tmp_path):
    for name in ("a", "old.txt", "more.txt"):
        (tmp_path / name).symlink_to(folder / name)
    old = config_of(tmp_path, "old", ["old.txt"])
    embed(old)
    new = config_of(tmp_path, "new", ["old.txt", "more.txt"], reuse=["old"])
    flip(old.shards_dir / "000001.tar")
    with pytest.raises(ShardError, match=rf"{old.shards_dir}: 000001\.tar: .*distill\.shards repair {old.shards_dir}"):
        embed(new)
    assert not list(new.run_dir.rglob("*.tar"))
    flip(old.shards_dir / "000001.tar")
    stage_of(new, "precompute").prepare()
    flip(old.shards_dir / "000001.tar")  # after the texts were looked up
    with pytest.raises(ShardError, match=r"000001\.tar: .*distill\.shards repair"):
        embed(new)
    repair(old.shards_dir)
    with pytest.raises(ValueError, match=r"shards\.reuse: no finished shard set at .*; or leave it out"):
        embed(new)
    embed(old)
    embed(new)
    (lookup,) = (new.precompute_dir / "reused").iterdir()
    flip(lookup / "000002.npy", 200)
    (new.shards_dir / "000002.tar").unlink()
    (new.precompute_dir / "DONE.json").unlink()
    with pytest.raises(ValueError, match=rf"000002\.npy is not as it was written .*delete {lookup}"):
        embed(new)
    shutil.rmtree(lookup)
    embed(new)
    assert verify_all(new.shards_dir) == []


@pytest.mark.slow
def test_a_task_that_is_killed_continues_and_leaves_the_same_shards(folder):
    expected = config_of(folder, "undisturbed", ["old.txt", "more.txt"], reuse=["old"])
    embed(expected)
    killed = config_of(folder, "killed", ["old.txt", "more.txt"], reuse=["old"])

    def start(before=None):
        return call("precompute.py", "--config", folder / "killed.yaml", before=before).returncode

    for kind in ("fsync precompute/reused/N.part/.N.npy.WRITER.part", "rename precompute/reused/N.part"):
        assert start(kill_at(killed.run_dir, kind, 1)) == -9
        assert [path.suffix for path in (killed.precompute_dir / "reused").iterdir()] == [".part"]
    assert start(kill_at(killed.run_dir, "rename shards/.N.tar.WRITER.part", 3)) == -9
    made = {path.name: path.stat().st_mtime_ns for path in killed.shards_dir.glob("*.tar")}
    assert len(made) == 2
    assert start() == 0
    assert all((killed.shards_dir / name).stat().st_mtime_ns == modified for name, modified in made.items())
    found = {name: digest for name, digest in digests(killed.shards_dir).items() if not name.startswith(".")}
    assert found == digests(expected.shards_dir)
    assert not list(killed.run_dir.rglob("*.part"))


def _task(path):
    torch.set_num_threads(1)
    stage_of(load_config(path), "precompute").run(CPU)


@pytest.mark.slow
def test_two_tasks_share_the_work(folder):
    expected = config_of(folder, "by-one", ["more.txt", "old.txt"], reuse=["old"], rows=25)
    embed(expected)
    new = config_of(folder, "by-two", ["more.txt", "old.txt"], reuse=["old"], rows=25)
    context = multiprocessing.get_context("fork")
    tasks = [context.Process(target=_task, args=(folder / "by-two.yaml",)) for _ in range(2)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0]
    assert embed(new) == (100, 400)
    assert digests(new.shards_dir) == digests(expected.shards_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 16}, "max_length: 32 there, 16 here"),
        ({"precision": "bf16"}, "precision: 'fp32' there, 'bf16' here"),
        ({"pooling": "cls", "prompt": "the "}, "pooling: 'mean' there, 'cls' here; prompt: None there, 'the ' here"),
    ],
)
def test_a_run_of_another_teacher_is_refused_before_anything_is_written(folder, change, message):
    config = config_of(folder, "refused", ["old.txt"], teacher_of(folder, "a") | change, ["old"])
    with pytest.raises(ValueError, match=rf"shards\.reuse: .*runs/old was made by another teacher \({message}\); or leave it"):
        open_run(config, ["precompute"])
    assert not config.run_dir.exists()


def test_a_run_in_the_precision_that_this_processor_has_not_is_refused_when_that_is_known(folder):
    config = config_of(folder, "auto", ["old.txt"], teacher_of(folder, "a") | {"precision": "auto"}, ["old"])
    stage = stage_of(config, "precompute")
    assert stage.refusal() is None and len(stage.reused_runs("fp32")) == 1
    with pytest.raises(ValueError, match="precision: 'fp32' there, 'bf16' here"):
        stage.prepare("bf16")


def test_other_weights_in_the_same_place_are_another_teacher(folder, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "a")
    (tmp_path / "old.txt").symlink_to(folder / "old.txt")
    embed(config_of(tmp_path, "old", ["old.txt"]))
    other = make_encoder(tmp_path / "other", layers=1, seed=9)
    shutil.copy(other / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"another teacher \(other files: model\.safetensors\)"):
        embed(config_of(tmp_path, "new", ["old.txt"], reuse=["old"]))


def test_runs_that_have_no_vectors_to_reuse_are_refused(folder, both):
    def refusal(reuse, teacher=None):
        return stage_of(config_of(folder, "refused", ["old.txt"], teacher, [reuse]), "precompute").refusal()

    assert "runs/none has no finished precompute: finish it, or name" in refusal("none")
    shutil.copytree(folder / "runs/old", folder / "runs/mixed")
    done = folder / "runs/mixed/precompute/DONE.json"
    shutil.copytree(folder / "runs/old", folder / "runs/damaged")
    flip(folder / "runs/damaged/precompute/DONE.json", 100)
    assert "DONE.json is damaged" in refusal("damaged")
    assert not list((folder / "runs/damaged").rglob("*.damaged")), "the reused run was changed"
    embed(config_of(folder, "shorter", ["old.txt"], max_sentences=100))
    shutil.copy(folder / "runs/shorter/precompute/DONE.json", done)
    assert "runs/mixed/shards has other shards than its run made" in refusal("mixed")
    assert "made by a teacher of 2 encoders, whose vectors are not taken apart" in refusal("both")
    other = teacher_of(folder, "a", "b", "c", weights=(1, 1, 1))
    assert "weights: [2.0, 1.0] there, [1.0, 1.0] here" in refusal("both", other)
    assert refusal("both", teacher_of(folder, "a", "b", "c", weights=(4, 2, 1))) is None
    with pytest.raises(ValueError, match=r"shards\.reuse saves an encoder's work, and teacher\.vectors has all"):
        config_of(folder, "refused", ["old.txt"], {"vectors": "v.npy"}, ["old"])


@pytest.mark.parametrize(
    ("runs", "made", "num_embedded"),
    [
        ({"old": "a"}, "ab", {"a": 100, "b": 500}),
        pytest.param({"one": "b"}, "ab", {"a": 500, "b": 100}, marks=pytest.mark.slow),
        pytest.param({"one": "b", "two": "a"}, "ab", {"a": 100, "b": 100}, marks=pytest.mark.soak),
        pytest.param({"one": "ab"}, "abc", {"a": 100, "b": 100, "c": 500}, marks=pytest.mark.soak),
        pytest.param({"one": "b", "two": "ab", "three": "bc"}, "abc", {"a": 100, "b": 100, "c": 500}, marks=pytest.mark.slow),
    ],
    ids=["a in ab", "b in ab", "b and a in ab", "ab in abc", "b, ab and bc in abc"],
)
def test_a_teacher_is_added_without_embedding_again_what_the_others_have(folder, caplog, runs, made, num_embedded):
    weights = dict(zip("abc", (3, 1, 2), strict=True))

    def teacher(names):
        return teacher_of(folder, *names, weights=[weights[name] for name in names] if len(names) > 1 else [None])

    of = "-".join(runs.values())
    for name, names in runs.items():
        if name != "old":
            embed(config_of(folder, f"{name}-{of}", ["old.txt"], teacher(names)))
    sources = ["old.txt", "more.txt"]
    caplog.set_level(logging.INFO, "distill")
    new = config_of(folder, f"new-{of}", sources, teacher(made), [name if name == "old" else f"{name}-{of}" for name in runs])
    embed(new)
    for name, number in num_embedded.items():
        assert f"{folder / name}: {500 - number} vectors are reused, {number} texts are to be embedded" in caplog.text
    whole = config_of(folder, f"whole-{of}", sources, teacher(made))
    embed(whole)
    check_equal(new, whole)


def test_an_encoder_that_has_nothing_to_embed_is_not_loaded(both, monkeypatch):
    loaded = []

    def load(config, *arguments, **options):
        loaded.append(config.model)
        return load_model(config, *arguments, **options)

    monkeypatch.setattr("distill.teacher.encoder.load_model", load)
    embed(config_of(both, "added", ["old.txt"], teacher_of(both, "a", "b", "c", weights=(2, 1, 1)), ["both"]))
    assert loaded == [str(both / "c")]
