"""The normal form, the hash and the hold-out rule."""

import hashlib
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill.corpus import HELD_OUT_MODULUS, is_held_out, normal_form, read_chunk, text_hash
from distill.corpus.chunks import as_line
from distill.corpus.text import stored

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)


@given(ANY_TEXT)
def test_a_normal_form_is_its_own_normal_form(text):
    assert normal_form(normal_form(text)) == normal_form(text)


@given(ANY_TEXT)
def test_a_normal_form_is_one_line_of_utf8_in_nfc(text):
    result = normal_form(text)
    assert len(result.splitlines()) <= 1
    assert result.encode().decode() == result == unicodedata.normalize("NFC", result) == result.strip()
    assert not any(unicodedata.category(character) == "Cc" for character in result)


def test_every_kind_of_whitespace_and_control_is_one_space():
    separators = "\n\r\t\x00\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x85\u00a0\u2028\u2029\u3000\ud800"
    assert normal_form(separators + "a" + separators + "b" + separators) == "a b"
    assert all(normal_form(f"a{separator}b") == "a b" for separator in separators)


def test_composed_and_decomposed_letters_are_the_same_text():
    assert normal_form("cafe\u0301") == normal_form("café") == "café"


def test_invisible_characters_make_no_text_and_no_other_text():
    invisible = (
        "\u00ad\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufeff\ufffb\U000e0001\U000e0041"
    )
    assert {unicodedata.category(character) for character in invisible} == {"Cf"}
    assert normal_form(invisible * 3) == normal_form(f" {invisible} ") == ""
    assert all(normal_form(f"{c}the{c} {c}mo{c}del{c}.{c}") == "the model." for c in invisible)
    assert normal_form("cafe\u200b\u0301") == "café"


def test_blanks_that_are_letters_symbols_or_marks_make_no_text_and_no_other_text():
    blanks, marks, fillers = "\u2800\u3164\uffa0", "\u034f\u17b4\u17b5", "\u115f\u1160\ufe0f\u180b"
    assert all(character.isprintable() for character in blanks + marks + fillers)
    assert normal_form(blanks * 9) == normal_form(marks * 9) == normal_form(f" {fillers * 9}{blanks} ") == ""
    assert normal_form("\ufe0f\u200d\ufe0f") == normal_form("\u115f\u200d\u1160\u180f") == ""
    assert all(normal_form(f"the{c}{c} model") == "the model" for c in blanks)
    assert all(normal_form(f"the{c} mo{c}del") == "the model" for c in marks)
    assert normal_form("\u115f\u1161") == "\u115f\u1161" and normal_form("❤\ufe0f") == "❤\ufe0f"


def test_zero_width_joiners_are_ignored_but_the_tags_of_a_flag_are_not():
    for text in ("\u0645\u06cc\u200c\u062e\u0648", "क\u094d\u200dष", "👩\u200d💻", "❤\ufe0f\u200d🔥"):
        assert normal_form(text) == normal_form(f"{text}\u200d\u200c") == text.replace("\u200c", "").replace("\u200d", "")
    flag = "🏴\U000e0067\U000e0062\U000e007f"
    assert normal_form(flag) == flag


@given(ANY_TEXT)
def test_a_text_is_stored_as_it_is_but_for_what_no_file_can_hold(text):
    kept = stored(text)
    assert kept.encode().decode() == kept and "\0" not in kept and len(kept) == len(text)
    assert all(a == b or a == "\0" or "\ud800" <= a <= "\udfff" for a, b in zip(text, kept, strict=True))


@given(st.lists(ANY_TEXT.map(stored), max_size=9))
def test_a_chunk_gives_back_its_texts_line_breaks_included(texts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chunk.txt"
        path.write_bytes("".join(map(as_line, texts)).encode())
        assert read_chunk(path) == texts


def test_texts_that_differ_in_their_whitespace_are_one():
    assert text_hash("def f():\n\treturn 1\n") == text_hash("def f(): return 1") == text_hash("def\u200b f():  return 1")


def test_the_hash_is_signed_64_bit_and_never_changes():
    assert text_hash("A sentence has a name.") == -6106200824828112321
    assert text_hash("café") == int.from_bytes(hashlib.blake2b("café".encode(), digest_size=8).digest(), "little", signed=True)
    hashes = [text_hash(str(number)) for number in range(1000)]
    assert min(hashes) < 0 < max(hashes) and np.array(hashes).dtype == np.int64


def test_held_out_is_the_unsigned_hash_modulo_fifty():
    hashes = np.array([text_hash(str(number)) for number in range(5000)], dtype=np.int64)
    assert is_held_out(hashes).tolist() == [value % 2**64 % HELD_OUT_MODULUS == 0 for value in hashes.tolist()]
    assert 50 < is_held_out(hashes).sum() < 150
