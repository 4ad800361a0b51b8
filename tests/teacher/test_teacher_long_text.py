# ruff: noqa: RUF001
"""Texts that are longer than the teacher reads: cut or dropped by its own tokenizer, with its prompts."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences, write_config
from encoders import save_sentence_transformer
from engines import CPU
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from distill.config import load_config, stage_of
from distill.corpus import read_chunk, spool, text_hash
from distill.corpus.text_config import SourceConfig
from distill.run.config import ConfigError
from distill.run.files import fingerprint, read_json
from distill.shards import ShardReader
from distill.teacher.encoder import Teacher
from distill.teacher.long_text import LongTexts
from distill.teacher.teacher_config import TeacherConfig

MINIATURES = Path(os.environ.get("DISTILL_MODELS", ".")) / "miniatures"
needs_miniatures = pytest.mark.skipif(not MINIATURES.is_dir(), reason="DISTILL_MODELS has no miniatures")
SOURCE = SourceConfig(type="file", path="text.txt")
ENGLISH = "The teacher reads. Does it read MORE than 3.14 words? “Yes!” it says (always). " * 4
MIXED = [
    ENGLISH + "\n\nA new paragraph\n\twith a line\r\nand another one. " * 3,
    "今天天气很好，我们去公园吧！好吗？我不知道。" * 9,
    "これは長い文章です。「はい。」と言った。" * 9,
    "def f(x):\n    return x + 1  # " + "emoji 🎉🏳️‍🌈 e\u0301" * 30,
    "nowhitespace" * 60,
    "🎉" * 90,
    "   \n" * 60 + "After much space. " + "And so on. " * 30 + "\n" * 90,
    "short",
]


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


@needs_miniatures
@pytest.mark.parametrize("prompt", [pytest.param("", marks=pytest.mark.slow), "query: "])
@pytest.mark.parametrize("name", ["bge", "modernbert", "xlmr", "sentence-t5", "qwen3", "cased-lower"])
def test_parts_lose_nothing_are_read_whole_and_no_sentence_more_would_fit(name, prompt):
    """Word pieces, byte-level BPE, a unigram model, padding on the left, and a model that lower-cases."""
    limit, folder = 64, MINIATURES / name
    teacher = TeacherConfig(model=str(folder), max_length=limit, prompt=prompt)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def num_tokens(text: str) -> int:
        return len(tokenizer(prompt + (text.lower() if name == "cased-lower" else text))["input_ids"])

    found = LongTexts("chunk", teacher, [SOURCE])(MIXED, 0)
    is_long = [num_tokens(text) > limit for text in MIXED]
    assert [parts != [text] for text, parts in zip(MIXED, found, strict=True)] == is_long and sum(is_long) >= 4
    for text, parts in zip(MIXED, found, strict=True):
        assert without_space("".join(parts)) == without_space(text)
        assert all(part in text and num_tokens(part) <= limit for part in parts)
    place = 0
    for part in found[0][:-1]:
        end = MIXED[0].index(part, place) + len(part)
        assert re.search(r"[.?!][”)]*$|a line$|paragraph$", part), part
        following = re.compile(r"\s*[^\n]*?(?:[.?!][”)]*(?=\s)|(?=\n))").match(MIXED[0], end)
        assert num_tokens(part + following[0]) > limit, following
        place = end
    assert {part[-1] for part in found[1][:-1]} <= set("！？。")
    assert LongTexts("drop", teacher, [SOURCE])(MIXED, 0) == [
        [] if long else [text] for text, long in zip(MIXED, is_long, strict=True)
    ]


@needs_miniatures
def test_a_text_is_cut_for_the_encoder_of_several_that_reads_least():
    both = TeacherConfig(
        model=str(MINIATURES / "bge"),
        max_length=200,
        concat=[{"model": str(MINIATURES / "xlmr"), "max_length": 24}, {"model": str(MINIATURES / "qwen3")}],
    )
    alone = TeacherConfig(model=str(MINIATURES / "xlmr"), max_length=24)
    long_text = ENGLISH.strip()
    assert LongTexts("chunk", both, [SOURCE])([long_text], 0) == LongTexts("chunk", alone, [SOURCE])([long_text], 0)
    assert LongTexts("drop", both, [SOURCE])([long_text, "short"], 0) == [[], ["short"]]


def test_each_source_has_the_room_that_its_prompt_leaves(tiny_encoder, tmp_path):
    folder = save_sentence_transformer(tiny_encoder, tmp_path / "model", prompts={"query": "the student of the teacher "})
    sources = [SOURCE, SOURCE.model_copy(update={"role": "query"}), SOURCE.model_copy(update={"prompt": "sends "})]
    long_texts = LongTexts("drop", TeacherConfig(model=str(folder), max_length=16), sources)
    for source, room in enumerate([14, 9, 13]):  # of 16 tokens, [CLS] and [SEP] and the prompt's
        texts = ["the " * room, "the " * (room + 1)]
        assert long_texts(texts, source) == [[texts[0]], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 9}, r"reads 9 tokens \(teacher\.max_length\), and its prompt '' leaves 7 for a text"),
        ({"max_length": 20, "prompt": "the " * 40}, "leaves 0 for a text; raise it, or leave text.long"),
    ],
)
def test_a_limit_that_leaves_no_room_for_a_text_is_refused(tiny_encoder, changes, message):
    with pytest.raises(ValueError, match=message):
        LongTexts("chunk", TeacherConfig(model=str(tiny_encoder), pooling="mean", **changes), [SOURCE])


@needs_miniatures
def test_a_teacher_that_reads_texts_of_any_length_is_refused():
    with pytest.raises(ValueError, match=r"static reads texts of any length: set teacher\.max_length, or leave text\.long"):
        LongTexts("drop", TeacherConfig(model=str(MINIATURES / "static")), [SOURCE])


def test_vectors_have_no_tokenizer_and_are_refused_in_one_line(tmp_path, tiny_encoder):
    vectors = [f"teacher={{vectors: {tmp_path / 'v.npy'}}}", f"student.init={tiny_encoder}"]
    for action in ("chunk", "drop"):
        with pytest.raises(ConfigError, match=f"text.long is {action}, for which the teacher's tokenizer counts.* leave"):
            load_config(write_config(tmp_path, tiny_encoder), [*vectors, f"text.long={action}"])
    assert load_config(write_config(tmp_path, tiny_encoder), vectors).text.long == "truncate"


def paragraphs() -> list[str]:
    """Texts of 1 to 12 sentences, which are among the shorter texts, or twice the same."""
    texts = sentences(300)
    draw = np.random.default_rng(0)
    found = [" ".join(texts[start : start + draw.integers(1, 13)]) for start in draw.integers(0, 280, 200)]
    return [*found, *found[:20], *texts[:40]]


def new_run(folder: Path, encoder: Path, *overrides: str):
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("\n".join(paragraphs()) + "\n")
    return load_config(write_config(folder, encoder), list(overrides))


def test_a_run_embeds_every_part_as_a_text_of_its_own(tmp_path, tiny_encoder, caplog):
    config = new_run(tmp_path, tiny_encoder, "text.long=chunk", "text.held_out=5")
    with caplog.at_level(logging.INFO):
        assert stage_of(config, "precompute").run(CPU)
    manifest = read_json(config.run_dir / "precompute/text/manifest.json")
    counts = manifest["counts"]
    reader, held_out = ShardReader(config.run_dir / "shards"), ShardReader(config.run_dir / "shards/held_out")
    stored = [*reader.texts(range(len(reader))), *held_out.texts(range(len(held_out)))]
    assert len(stored) == len(set(stored)) == counts["kept"] + counts["held_out"]
    assert not any(text_hash(text) % 2**64 % 50 == 0 for text in reader.texts(range(len(reader))))
    assert {without_space(text) for text in stored} <= {
        without_space("".join(parts))
        for text in paragraphs()
        for sentence_list in [re.findall(r"[^.]*\.", text)]
        for start in range(len(sentence_list))
        for parts in (sentence_list[start:stop] for stop in range(start + 1, len(sentence_list) + 1))
    }
    assert counts["read"] == 260 and 0 < counts["cut"] < counts["parts"]
    left = counts["read"] + counts["parts"] - counts["cut"]
    assert left == sum(counts[name] for name in ("duplicates", "kept", "held_out", "held_out_unused"))
    assert f"260 texts read, {counts['cut']} of them cut into {counts['parts']} (text.long = chunk), " in caplog.text
    assert "longer ones are truncated" not in caplog.text
    teacher = Teacher(config.teacher, CPU, None)
    again = teacher(reader.texts(range(9)))
    assert np.abs(again - reader.vectors(range(9))).max() < 1e-3


def test_a_run_drops_and_counts_what_its_teacher_would_cut(tmp_path, tiny_encoder, caplog):
    config = new_run(tmp_path, tiny_encoder, "text.long=drop")
    with caplog.at_level(logging.INFO):
        counts = stage_of(config, "precompute").prepare()["counts"]
    folder = config.run_dir / "precompute/text"
    kept = {text for path in folder.glob("*.txt") for text in read_chunk(path)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    assert kept == {text for text in paragraphs() if len(tokenizer(text)["input_ids"]) <= 32}
    assert 0 < counts["dropped_long"] < 260
    assert f"{counts['dropped_long']} of more tokens than the teacher reads (text.long = drop)" in caplog.text


def test_parts_without_visible_characters_are_left_out(tmp_path, tiny_encoder):
    config = new_run(tmp_path, tiny_encoder, "text.long=chunk")
    (tmp_path / "text.txt").write_text("the teacher reads " * 30 + "\u200b " * 200 + "\n" + "a text\n" * 2)
    manifest = stage_of(config, "precompute").prepare()
    texts = [
        text for entry in manifest["chunks"] for text in read_chunk(config.run_dir / f"precompute/text/{entry['name']}.txt")
    ]
    assert texts and all(text.replace("\u200b", "").strip() for text in texts)


def test_a_killed_preparation_continues_and_writes_the_same_parts(tmp_path, tiny_encoder, monkeypatch):
    whole = new_run(tmp_path / "whole", tiny_encoder, "text.long=chunk")
    expected = stage_of(whole, "precompute").prepare()
    config = new_run(tmp_path / "cut", tiny_encoder, "text.long=chunk")
    monkeypatch.setattr(spool, "BLOCK_ROWS", 40)
    monkeypatch.setattr(spool, "JOURNAL_EVERY", 2)
    read_translated = spool.read_translated

    def ends_early(source):
        for number, text in enumerate(read_translated(source)):
            if number == 130:
                raise KeyboardInterrupt
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(spool, "read_translated", ends_early)
        with pytest.raises(KeyboardInterrupt):
            stage_of(config, "precompute").prepare()
    cut_before = []
    call = LongTexts.__call__
    monkeypatch.setattr(
        LongTexts, "__call__", lambda self, texts, source: cut_before.append(len(texts)) or call(self, texts, source)
    )
    found = stage_of(config, "precompute").prepare()
    assert sum(cut_before) == 260 - 80
    assert found["fingerprint"] == expected["fingerprint"] and found["counts"] == expected["counts"]


def test_the_tokenizer_and_the_limit_are_part_of_the_texts_identity_only_where_they_decide(tmp_path, tiny_encoder):
    made_from = {}
    for name, overrides in {
        "truncate": (),
        "truncate-longer": ("teacher.max_length=48",),
        "chunk": ("text.long=chunk",),
        "chunk-longer": ("text.long=chunk", "teacher.max_length=48"),
        "chunk-prompt": ("text.long=chunk", "teacher.prompt=a"),
        "drop": ("text.long=drop",),
    }.items():
        config = new_run(tmp_path, tiny_encoder, f"name={name}", *overrides)
        made_from[name] = stage_of(config, "precompute").prepare()["made_from"]
        begun = read_json(config.run_dir / "precompute/BEGUN.json")
        assert begun["settings"]["text"].get("long") == (None if "truncate" in name else name.split("-")[0])
    assert made_from["truncate"] == made_from["truncate-longer"]
    assert len(set(made_from.values())) == 5


def test_text_of_the_default_has_the_identity_that_earlier_versions_gave_it(tmp_path, tiny_encoder):
    config = new_run(tmp_path, tiny_encoder)
    stage = stage_of(config, "precompute")
    text = config.text.model_dump(mode="json")
    del text["long"], text["sources"][0]["weight"], text["sources"][0]["columns"]
    form = {"rows_per_chunk": 200, "keep_row_numbers": False, "normal_form": 2}
    sources = {str(tmp_path / "text.txt"): stage.digest(tmp_path / "text.txt")}
    assert stage.prepare()["made_from"] == fingerprint(form | {"text": text, "sources": sources})


def test_text_that_another_limit_cut_is_prepared_again(tmp_path, tiny_encoder):
    before = stage_of(new_run(tmp_path, tiny_encoder, "text.long=chunk"), "precompute").prepare()
    again = stage_of(new_run(tmp_path, tiny_encoder, "text.long=chunk"), "precompute")
    assert again.progress() == [again.directory / "text"]
    changed = new_run(tmp_path, tiny_encoder, "text.long=chunk", "teacher.max_length=24")
    assert stage_of(changed, "precompute").prepare()["counts"]["parts"] > before["counts"]["parts"]


@needs_miniatures
@pytest.mark.parametrize(("name", "attention"), [("modernbert", "sdpa"), ("deberta-v2", "eager")])
def test_on_a_cpu_long_inputs_have_fused_attention_where_there_is_one_and_the_same_vectors(name, attention):
    folder = MINIATURES / name
    teacher = Teacher(TeacherConfig(model=str(folder), precision="fp32"), CPU, None)
    encoder = teacher.encoders[0].model[0].model
    peer = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    for text, expected in (("the teacher reads " * 400, attention), ("the teacher reads", "eager")):
        (vector,), (reference,) = teacher([text]), peer.encode([text], normalize_embeddings=True)
        assert encoder.config._attn_implementation == expected
        assert vector @ reference > 0.99999 * np.linalg.norm(vector)  # stored in fp16


PEAK = """
import re, sys
from pathlib import Path
import torch
texts = ["word of the long document " * 1500]
if sys.argv[2] == "peer":
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": torch.float32})
    model.max_seq_length = 4096
    model.encode(texts)
else:
    from distill.teacher.encoder import Teacher
    from distill.teacher.teacher_config import TeacherConfig
    config = TeacherConfig(model=sys.argv[1], max_length=4096, precision="fp32", tokens_per_batch=4096)
    Teacher(config, torch.device("cpu"), None)(texts)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@needs_miniatures
def test_a_document_of_4096_tokens_takes_no_more_memory_than_with_sentence_transformers():
    peaks = {}
    for who in ("peer", "ours"):
        command = [sys.executable, "-c", PEAK, MINIATURES / "modernbert", who]
        peaks[who] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert peaks["ours"] < 1.1 * peaks["peer"]  # of eager attention, eight take four times as much
