"""Long texts, cut into parts: at the ends of sentences and lines, else of words, else of tokens.

The parts of a text, with the whitespace between them, are the text: no character is lost, changed or repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

_CLOSERS = "\"'”’»)\\]}」』】》〉）"  # noqa: RUF001
# the full stops of Chinese and Japanese end a sentence without a space after them
_SENTENCE_END = re.compile(
    rf"[.!?…؟۔।॥]+[{_CLOSERS}]*(?=\s)|[。！？｡]+[{_CLOSERS}]*|[\n\r\v\f\x85\u2028\u2029]"  # noqa: RUF001
)
_WORD_END = re.compile(r"(?<=\S)(?=\s)")
_SPACE = re.compile(r"\s*")
T = TypeVar("T", bound=Sized)
FAR = 3  # where a reading says 1


class Limit(Protocol):
    """What becomes of texts that are longer than their encoder reads.

    Called with stored texts and the number of their source, it returns for each the texts that take its place: itself where it
    is short enough, else its parts, or none. identity: all that decides this, as JSON.
    """

    identity: Mapping[str, Any]

    def __call__(self, texts: Sequence[str], source: int) -> list[list[str]]: ...


class Reading(NamedTuple):
    """How an encoder reads a text: ends, int64 [tokens], ascending: the character after each token; room: the number of tokens
    that it reads of a text, without prompt and special tokens."""

    ends: np.ndarray
    room: int


def cut(text: str, readings: Sequence[Reading]) -> Generator[str, bool, list[str]]:
    """Yields texts, to be answered by whether they are short enough, and returns the parts of `text`.

    Each part reaches to the last end of a sentence or line with which it is short enough; where there is none, of a word, or of
    a token of the first reading. The readings say where to look: a part's tokens are not always those that the whole text has
    there. A single token is a part even if it is not short enough.
    """
    levels = [_ends_of(_SENTENCE_END, text), _ends_of(_WORD_END, text), np.unique([*readings[0].ends, len(text)])]
    parts, start = [], 0
    while start < len(text):
        reach = min(_reach(reading, start, len(text)) for reading in readings)
        end = yield from _longest(text, start, reach, levels)
        parts.append(_between(text, start, end))
        start = _after_space(text, end)
    return parts


def _longest(text: str, start: int, reach: int, levels: Sequence[np.ndarray]) -> Generator[str, bool, int]:
    """The end of the longest part from `start` that is short enough, found by trying ends in growing steps from `reach`.

    Ends at more than FAR times the distance of `reach` are not tried.
    """
    far = start + FAR * (reach - start)
    for ends in levels:
        first, near, stop = np.searchsorted(ends, [start, reach, far], side="right").tolist()
        low, high, step = first - 1, stop, 1  # the last place that is known to fit, and the first that is known not to
        place = max(first, near - 1)
        while high - low > 1:
            if (yield _between(text, start, ends[place])):
                low, place = place, place + step
            else:
                high, place = place, place - step
            step *= 2
            if not low < place < high:
                place = (low + high) // 2
        if low >= first:
            return int(ends[low])
    return int(ends[first])


def _reach(reading: Reading, start: int, length: int) -> int:
    """Where as many tokens end as there is room for, from `start` on."""
    last = int(np.searchsorted(reading.ends, start, side="right")) + reading.room - 1
    return int(reading.ends[last]) if last < len(reading.ends) else length


def _between(text: str, start: int, end: int) -> str:
    """The part from `start` to `end`, without the whitespace before a cut."""
    return text[start:end] if end == len(text) else text[start:end].rstrip()


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _ends_of(pattern: re.Pattern[str], text: str) -> np.ndarray:
    return np.unique([*(found.end() for found in pattern.finditer(text)), len(text)])


def blocks(texts: Iterable[T], max_rows: int, max_chars: int, chars: Callable[[T], int] = len) -> Iterator[list[T]]:
    """Blocks of at most `max_rows` texts, and of not many more than `max_chars` characters, counted by `chars`."""
    block: list[T] = []
    num_chars = 0
    for text in texts:
        block.append(text)
        num_chars += chars(text)
        if len(block) == max_rows or num_chars >= max_chars:
            yield block
            block, num_chars = [], 0
    if block:
        yield block
