"""A student with a part of the tokens encodes texts that consist of them as before, whatever its tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences
from distributed_ranks import on_ranks
from engines import CPU, train_stage
from transformers import AutoModel, AutoTokenizer

from distill.config import load_config, stage_of
from distill.run.collectives import barrier, rank
from distill.run.config import ConfigError, validate
from distill.student import Student
from distill.student.initial import build_student
from distill.student.student_config import StudentConfig
from distill.student.vocabulary import TokenTable, count_tokens, parts_of_merges, trim, trim_and_describe

MINIATURES = Path(os.environ.get("DISTILL_MODELS", ".")) / "miniatures"
KINDS = ["bge", "mpnet", "qwen3", "modernbert", "gemma3", "xlmr", "sentence-t5"]
WITH_BYTES = ["qwen3", "modernbert", "gemma3"]
needs_miniatures = pytest.mark.skipif(not MINIATURES.is_dir(), reason="DISTILL_MODELS has no miniatures")
WORDS = (  # noqa: SIM905
    "A house by the river was rebuilt after the war; its owner, a physicist from Lisbon, had left for America in 1938. The town"
    " council recorded 45 meetings about the garden, the bridge and the old railway station, where musicians played on Sundays."
).split()


def lines(count: int, seed: int = 0) -> list[str]:
    """English words in any order, as the miniatures' tokenizers split them into parts of words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) for _ in range(count)]


class Texts:
    """The texts of a ShardReader, without shards."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, indices) -> list[str]:
        return [self._texts[index] for index in indices]

    def roles(self, indices) -> list[None]:
        return [None] * len(indices)


def of(folder: Path) -> Student:
    return build_student(StudentConfig(init=str(folder), max_length=64), None, 0).eval()


def table_of(student: Student) -> TokenTable:
    return TokenTable(student.tokenizer, student.encoder.config)


def counted(student: Student, texts: list[str]) -> dict[int, int]:
    *_, counts = count_tokens(student, Texts(texts))
    return counts


def trimmed(folder: Path, texts: list[str], size: int | None = None) -> Student:
    student = of(folder)
    trim(student, table_of(student).select(counted(student, texts), size))
    return student


def tokens_of(student: Student, texts: list[str]) -> list[list[str]]:
    return [student.tokenizer.convert_ids_to_tokens(ids) for ids in student.token_ids(texts)]


@torch.no_grad()
def vectors_of(student: Student, texts: list[str]) -> torch.Tensor:
    return student(student.tokenize(texts))


def length_of(student: Student, texts: list[str]) -> int:
    return sum(map(len, student.token_ids(texts)))


@needs_miniatures
@pytest.mark.parametrize("name", KINDS)
def test_texts_whose_tokens_are_kept_have_the_same_tokens_and_vectors(name):
    whole, part = of(MINIATURES / name), trimmed(MINIATURES / name, lines(40))
    assert len(part.tokenizer) < len(whole.tokenizer)
    assert part.encoder.get_input_embeddings().num_embeddings == part.encoder.config.vocab_size == len(part.tokenizer)
    texts = lines(40)
    assert tokens_of(part, texts) == tokens_of(whole, texts)
    assert torch.equal(vectors_of(part, texts), vectors_of(whole, texts))


@needs_miniatures
@pytest.mark.parametrize("name", KINDS)
def test_texts_of_the_most_frequent_tokens_have_the_same_tokens(name):
    whole = of(MINIATURES / name)
    table, counts = table_of(whole), counted(whole, lines(200))
    needed = len(table.always | table.characters(counts))
    part = trimmed(MINIATURES / name, lines(200), needed + 25)
    assert needed < len(part.tokenizer) <= needed + 25
    kept = set(part.tokenizer.get_vocab())
    expected = tokens_of(whole, WORDS)
    same = [found == tokens for found, tokens in zip(tokens_of(part, WORDS), expected, strict=True) if kept.issuperset(tokens)]
    assert same and all(same) and len(same) < len(WORDS)


@needs_miniatures
@pytest.mark.parametrize("name", WITH_BYTES)
def test_a_smaller_vocabulary_gives_more_tokens_and_none_that_is_unknown(name):
    texts = [*lines(40, seed=1), "Ĉu heron 鷺 🪶 flies?"]
    students = [of(MINIATURES / name), *(trimmed(MINIATURES / name, lines(40), size) for size in (None, 350, 310))]
    lengths = [length_of(student, texts) for student in students]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    for student in students:
        unknown = table_of(student).unknown
        assert not any(unknown in ids for ids in student.token_ids(texts))
        decoded = [student.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in student.token_ids(texts[:3])]
        assert decoded == texts[:3]


@needs_miniatures
@pytest.mark.parametrize("name", ["bge", "xlmr"])
def test_unseen_words_split_into_the_characters_of_the_text(name):
    student = trimmed(MINIATURES / name, ["heron", "the old house"])
    unknown = table_of(student).unknown
    assert unknown not in student.token_ids(["snored"])[0] and unknown in student.token_ids(["鷺"])[0]


@needs_miniatures
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_every_merge_that_leads_to_a_kept_token_is_kept(name):
    whole, part = of(MINIATURES / name), trimmed(MINIATURES / name, lines(40), 350)
    models = [json.loads(each.tokenizer.backend_tokenizer.to_str())["model"] for each in (whole, part)]
    before, after = (
        {(each["tokens"][result], *sorted(each["tokens"][part] for part in parts)) for result, parts in each["parts"].items()}
        for each in ({"parts": parts_of_merges(m, m["vocab"]), "tokens": {v: k for k, v in m["vocab"].items()}} for m in models)
    )
    assert after == {merge for merge in before if merge[0] in models[1]["vocab"]}
    assert after < before


@needs_miniatures
@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_keep_their_names_embeddings_and_places(name):
    whole, part = of(MINIATURES / name), trimmed(MINIATURES / name, lines(40), None)
    assert part.tokenizer.special_tokens_map == whole.tokenizer.special_tokens_map
    assert set(part.tokenizer.all_special_tokens) == set(whole.tokenizer.all_special_tokens)
    tables = [student.encoder.get_input_embeddings().weight for student in (whole, part)]
    for token in whole.tokenizer.all_special_tokens:
        ids = [student.tokenizer.convert_tokens_to_ids(token) for student in (whole, part)]
        assert torch.equal(tables[0][ids[0]], tables[1][ids[1]])
    for key, value in whole.encoder.config.to_dict().items():
        if key.endswith("token_id") and value is not None:
            found = part.tokenizer.convert_ids_to_tokens(getattr(part.encoder.config, key))
            assert found == whole.tokenizer.convert_ids_to_tokens(value)
    assert part.encoder.get_input_embeddings().padding_idx == whole.encoder.get_input_embeddings().padding_idx
    assert part.tokenizer.padding_side == whole.tokenizer.padding_side
    assert part.tokenizer.model_max_length == whole.tokenizer.model_max_length
    pairs = [student.tokenizer("the old house", "the river")["input_ids"] for student in (whole, part)]
    assert part.tokenizer.convert_ids_to_tokens(pairs[1]) == whole.tokenizer.convert_ids_to_tokens(pairs[0])


@needs_miniatures
@pytest.mark.parametrize("name", KINDS)
def test_a_trimmed_student_is_saved_and_loaded_the_same(name, tmp_path):
    student = trimmed(MINIATURES / name, lines(40), None)
    student.save(tmp_path, student.state_dict())
    loaded = Student.load(tmp_path).eval()
    texts = [*lines(20, seed=1), "Ĉu heron 鷺?"]
    assert loaded.token_ids(texts) == student.token_ids(texts)
    assert torch.equal(vectors_of(loaded, texts), vectors_of(student, texts))
    assert loaded.tokenizer.special_tokens_map == student.tokenizer.special_tokens_map
    plain = AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True, max_length=64)["input_ids"]
    assert plain == student.token_ids(texts)


@needs_miniatures
def test_a_padding_token_that_would_move_is_refused_where_positions_begin_with_it():
    student = of(MINIATURES / "xlmr")
    kept = sorted(table_of(student).always - {0})
    with pytest.raises(ValueError, match=r"a xlm-roberta numbers positions from its padding token 1, which would become 0"):
        trim(student, kept)


def write_added(tiny_encoder: Path, folder: Path) -> Path:
    """The tiny encoder with a special and an ordinary token that its WordPiece model does not have."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<query>"]})
    tokenizer.add_tokens(["<unused>", "gt-all"])
    encoder = AutoModel.from_pretrained(tiny_encoder)
    encoder.resize_token_embeddings(len(tokenizer))
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_added_tokens_outside_the_vocabulary_of_the_model(tiny_encoder, tmp_path):
    folder = write_added(tiny_encoder, tmp_path / "added")
    texts = ["<query> the gt-all model reads.", "the <query>"]
    whole, part = of(folder), trimmed(folder, texts)
    vocabulary = part.tokenizer.get_vocab()
    assert {"<query>", "gt-all", "reads"} < vocabulary.keys() and not {"<unused>", "writes"} & vocabulary.keys()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert tokens_of(part, texts) == tokens_of(whole, texts)
    assert torch.equal(vectors_of(part, texts), vectors_of(whole, texts))
    (tmp_path / "saved").mkdir()
    part.save(tmp_path / "saved", part.state_dict())
    assert Student.load(tmp_path / "saved").token_ids(texts) == part.token_ids(texts)


def test_tokens_are_kept_by_falling_count_and_of_equal_counts_by_their_place(tiny_encoder):
    student = of(tiny_encoder)
    table = table_of(student)
    ids = [table.ids[word] for word in ("shard", "rank", "batch", "loss")]
    counts = dict(zip(ids, (2, 3, 2, 1), strict=True))
    needed = table.select(counts, None)
    alone = len(needed) - len(ids)
    for room, words in ((0, []), (1, [1]), (2, [0, 1]), (3, [0, 1, 2])):
        kept = table.select(counts, alone + room)
        assert len(kept) == alone + room and [place for place in range(4) if ids[place] in kept] == words


def test_a_size_without_room_for_special_tokens_and_characters_is_refused(tiny_encoder):
    student = of(tiny_encoder)
    table, counts = table_of(student), counted(student, ["the model"])
    needed = len(table.always) + 2 * len(set("themodel"))
    assert len(table.select(counts, needed)) == needed
    with pytest.raises(ValueError, match=f"size {needed - 1} is too small: .* characters alone are {needed}$"):
        table.select(counts, needed - 1)


def test_texts_are_counted_evenly_over_the_set(tiny_encoder):
    student = of(tiny_encoder)
    texts = [*["the model"] * 9_000, *["a teacher"] * 9_000]
    found = list(count_tokens(student, Texts(texts), limit=9_000))
    table = table_of(student)
    assert len(found) == 2 and found[-1][table.ids["the"]] == found[-1][table.ids["teacher"]] == 4_500
    assert found[0][table.ids["[CLS]"]] == 8_192 and found[-1] == list(count_tokens(student, Texts(texts), limit=9_000))[-1]


def test_a_prompt_that_is_not_pooled_is_counted(tiny_encoder):
    student = of(tiny_encoder)
    student.settings = student.settings.__class__(
        include_prompt=False, prompts={"query": "find the: "}, default_prompt_name="query"
    )
    counts = counted(student, ["a model"])
    assert counts[table_of(student).ids["the"]] == 1


def test_a_line_says_what_was_cut(tiny_encoder):
    student = of(tiny_encoder)
    total, params = len(student.tokenizer), sum(p.numel() for p in student.parameters())
    kept = table_of(student).select(counted(student, ["the model learns."]), None)
    told = trim_and_describe(student, kept, Texts(["the teacher", "the key Ж"]))
    less = params - 32 * (total - len(kept))
    assert told == (  # c of teacher and k of key are not among the characters of the text
        f"{len(kept)} of {total} tokens; {params:,} parameters before, {less:,} after; in 2 held-out texts 11.111% of the"
        " tokens unknown before, 33.333% after, 4.50 tokens per text before, 4.50 after"
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "needs one of from and tokens"),
        ({"from": "text", "tokens": "list.txt"}, "needs one of from and tokens"),
        ({"tokens": "list.txt", "size": 4}, "size belongs to from: text"),
        ({"from": "words"}, "vocabulary.from: Input should be 'text'"),
        ({"from": "text", "sise": 4}, "unknown key vocabulary.sise; did you mean size?"),
    ],
)
def test_a_vocabulary_has_one_source(written, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        validate(StudentConfig, {"vocabulary": written}, "student")


def digest_of(student: Student) -> str:
    state = b"".join(value.numpy().tobytes() for value in student.state_dict().values())
    return hashlib.sha256(state + student.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def set_up(config: Path, overrides: list[str]) -> tuple[str, int]:
    stage = stage_of(load_config(config, overrides), "ckd")
    if rank() == 0:
        stage.begin()
    barrier()
    student = stage.setup(CPU, None).student
    return digest_of(student), len(student.tokenizer)


@pytest.mark.parametrize("size", [pytest.param(75, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.soak)])
def test_all_ranks_and_a_second_start_have_the_same_student(size, embedded_copy, caplog):
    config, run = embedded_copy
    overrides = [f"student.vocabulary={{from: text, size: {'null' if size is None else size}}}"]
    first, second = on_ranks(2, set_up, config, overrides)
    assert first == second and first[1] <= (size or 103)
    written = (run / "ckd/vocabulary.json").read_bytes()
    caplog.set_level(logging.INFO, "distill")
    assert set_up(config, overrides) == first and (run / "ckd/vocabulary.json").read_bytes() == written
    assert f"ckd: vocabulary: {first[1]} of 104 tokens; " in caplog.text


def test_a_list_of_tokens_is_an_input_of_the_stage(embedded_copy, tmp_path):
    config, _ = embedded_copy
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("the\nmodel\n\n##s\n")
    overrides = [f"student.vocabulary={{tokens: {tokens}}}"]
    set_up(config, overrides)
    stage = stage_of(load_config(config, overrides), "ckd")
    student = stage.setup(CPU, None).student
    assert {"the", "model", "##s", "d", "##d"} < student.tokenizer.get_vocab().keys()
    assert len(student.tokenizer) == 5 + 2 + 2 * len(set("themodels"))
    before = stage.inputs()
    tokens.write_text("the\n")
    assert [name for name, digest in stage.inputs().items() if digest != before[name]] == ["student.vocabulary.tokens"]


@pytest.mark.slow
def test_a_stopped_stage_gives_the_same_student_as_one_that_was_not(embedded_copy):
    config, run = embedded_copy
    students = []
    for name in ("straight", "stopped"):
        overrides = [f"name={name}", f"shards_from={run.name}", "student.vocabulary={from: text, size: 75}", "ckd.max_steps=6"]
        if name == "stopped":
            assert on_ranks(2, train_stage, config, "ckd", overrides, lambda step: step == 3)[0].startswith("ckd: stopped")
            assert (run.parent / name / "ckd/vocabulary.json").is_file()
        on_ranks(2, train_stage, config, "ckd", overrides)
        folder = run.parent / name / "ckd"
        assert not (folder / "vocabulary.json").exists()
        students.append(Student.load(folder / "student"))
    assert digest_of(students[0]) == digest_of(students[1])
    assert len(students[0].tokenizer) == students[0].encoder.config.vocab_size <= 75
    assert np.isfinite(students[0].encode(sentences(8))).all()
