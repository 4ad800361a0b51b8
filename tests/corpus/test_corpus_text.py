"""The normal form, the hash and the hold-out rule."""

import hashlib
import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill.corpus import HELD_OUT_MODULUS, is_held_out, normalise, text_hash

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)


@given(ANY_TEXT)
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(ANY_TEXT)
def test_a_normalised_text_is_one_line_of_utf8_in_nfc(text):
    result = normalise(text)
    assert len(result.splitlines()) <= 1
    assert result.encode().decode() == result == unicodedata.normalize("NFC", result) == result.strip()
    assert not any(unicodedata.category(character) == "Cc" for character in result)


def test_every_kind_of_whitespace_and_control_is_one_space():
    separators = "\n\r\t\x00\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x85\u00a0\u2028\u2029\u3000\ud800"
    assert normalise(separators + "a" + separators + "b" + separators) == "a b"
    assert all(normalise(f"a{separator}b") == "a b" for separator in separators)


def test_composed_and_decomposed_letters_are_the_same_text():
    assert normalise("cafe\u0301") == normalise("café") == "café"


def test_invisible_characters_make_no_text_and_no_other_text():
    invisible = (
        "\u00ad\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufeff\ufffb\U000e0001\U000e0041"
    )
    assert {unicodedata.category(character) for character in invisible} == {"Cf"}
    assert normalise(invisible * 3) == normalise(f" {invisible} ") == ""
    assert all(normalise(f"{c}the{c} {c}mo{c}del{c}.{c}") == "the model." for c in invisible)
    assert normalise("cafe\u200b\u0301") == "café"


def test_joiners_that_change_a_word_or_an_emoji_stay():
    for text in (
        "\u0645\u06cc\u200c\u062e\u0648",
        "क\u094d\u200dष",
        "👩\u200d💻",
        "❤\ufe0f\u200d🔥",
        "🏴\U000e0067\U000e0062\U000e007f",
    ):
        assert normalise(text) == normalise(f"{text}\u200d\u200c") == text
    assert normalise("\u0645\u06cc\u200c\u200c\u200b\u062e\u0648") == "\u0645\u06cc\u200c\u062e\u0648"


def test_the_hash_is_signed_64_bit_and_never_changes():
    assert text_hash("A sentence has a name.") == -6106200824828112321
    assert text_hash("café") == int.from_bytes(hashlib.blake2b("café".encode(), digest_size=8).digest(), "little", signed=True)
    hashes = [text_hash(str(number)) for number in range(1000)]
    assert min(hashes) < 0 < max(hashes) and np.array(hashes).dtype == np.int64


def test_held_out_is_the_unsigned_hash_modulo_fifty():
    hashes = np.array([text_hash(str(number)) for number in range(5000)], dtype=np.int64)
    assert is_held_out(hashes).tolist() == [value % 2**64 % HELD_OUT_MODULUS == 0 for value in hashes.tolist()]
    assert 50 < is_held_out(hashes).sum() < 150
