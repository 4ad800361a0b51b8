# ruff: noqa: RUF001
"""Cuts of long texts: nothing is lost, no part is too long, and parts end where a sentence does where they can."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.corpus.long_text import Reading, blocks, cut

WORDS = re.compile(r"\w+|[^\w\s]")  # the tokens of these tests


def num_tokens(text: str) -> int:
    return len(WORDS.findall(text))


def parts_of(text: str, limit: int, *, shift: int = 0) -> list[str]:
    """The parts of at most `limit` tokens. shift: by how many tokens the reading is wrong."""
    reading = Reading(np.array([found.end() for found in WORDS.finditer(text)], np.int64), max(1, limit + shift))
    cutting = cut(text, [reading])
    try:
        tried = next(cutting)
        while True:
            tried = cutting.send(num_tokens(tried) <= limit)
    except StopIteration as finished:
        return finished.value


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("One two. Three four! Five six? Seven.", 6, ["One two. Three four!", "Five six? Seven."]),
        ('He said "No way." Then he left (at 3.14). End.', 10, ['He said "No way."', "Then he left (at 3.14).", "End."]),
        ("a heading\n\nA line\nanother line here\n", 4, ["a heading\n\nA line", "another line here\n"]),
        ("今天天气很好。我们去公园吧！好吗？", 3, ["今天天气很好。", "我们去公园吧！", "好吗？"]),
        ("「そうです。」と彼は言った。はい。", 7, ["「そうです。」と彼は言った。", "はい。"]),
        ("यह एक है। वह दो है। अंत।", 8, ["यह एक है।", "वह दो है।", "अंत।"]),
        ("one two three four five six", 4, ["one two three four", "five six"]),
        ("Short. one two three four five six. Short again.", 4, ["Short.", "one two three four", "five six.", "Short again."]),
        ("a-b-c-d-e", 4, ["a-b-", "c-d-", "e"]),
        ("   indented one. Two three four.   ", 5, ["   indented one.", "Two three four.   "]),
    ],
)
@pytest.mark.parametrize("shift", [0, -1, 4])
def test_parts_reach_to_the_last_sentence_line_word_or_token_that_fits(text, limit, parts, shift):
    found = parts_of(text, limit, shift=shift)
    assert found == parts
    assert all(num_tokens(part) <= limit for part in found)


TEXTS = st.text(st.sampled_from("ab.!? \n\t。！「」\u2028é-"), max_size=60)


@given(text=TEXTS, limit=st.integers(1, 12), shift=st.integers(-4, 4))
def test_parts_and_the_whitespace_between_them_are_the_text(text, limit, shift):
    place = 0
    for part in parts_of(text, limit, shift=shift):
        assert num_tokens(part) <= limit
        start = text.index(part, place)
        assert text[place:start].strip() == ""
        place = start + len(part)
    assert text[place:].strip() == ""


@given(text=TEXTS, limit=st.integers(1, 12), shift=st.integers(0, 6))
def test_a_reading_that_points_too_far_makes_no_difference(text, limit, shift):
    exact, too_far = parts_of(text, limit), parts_of(text, limit, shift=shift)
    assert [part.rstrip() for part in too_far] == [
        part.rstrip() for part in exact
    ]  # the last part may have the text's last blanks


def test_an_end_of_a_sentence_that_is_far_away_is_not_tried():
    """A text without any sentence is not tokenised again for each of its parts."""
    text = "word " * 1000
    cutting, tried = cut(text, [Reading(np.arange(4, 5000, 5), 10)]), []
    with pytest.raises(StopIteration) as finished:
        tried.append(next(cutting))
        while True:
            tried.append(cutting.send(num_tokens(tried[-1]) <= 10))
    assert len(finished.value.value) == 100 and max(map(len, tried)) <= 150
    assert len(tried) <= 6 * 100


def test_a_token_that_is_too_long_by_itself_is_a_part_and_ends_nothing():
    cutting = cut("ab cd", [Reading(np.array([2, 5]), 1)])
    next(cutting)
    with pytest.raises(StopIteration) as finished:
        while True:
            cutting.send(False)
    assert finished.value.value == ["ab", "cd"]


def test_blocks_end_at_their_number_of_rows_or_characters():
    texts = ["a" * 5, "b", "c", "d", "e" * 10, "f"]
    assert list(blocks(texts, 3, 100)) == [texts[:3], texts[3:]]
    assert list(blocks(iter(texts), 100, 6)) == [texts[:2], texts[2:5], texts[5:]]
    assert list(blocks([], 3, 6)) == []
