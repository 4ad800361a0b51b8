"""Whether a server reads whole texts: embedding servers drop what exceeds their longest input, and do not say so.

The longest text is embedded as it is and with another ending. Equal vectors: the ending is not read, and bisection finds where
reading ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.run.files import read_json, write_json
from distill.teacher.endpoint import EndpointTeacher

Embed = Callable[[Sequence[str]], np.ndarray]
SHORT = 64  # characters, which every server reads
READ_FRACTION = 0.9  # of the longest text: a change of its last tenth is well above rounding, if it is read
RESOLUTION = 0.01  # of the number of characters that are read
MIN_DIFFERENCE = 1e-6  # 1 - cosine of two texts, at least; float32 rounds to less
NOISE_MARGIN = 4  # times the difference between two vectors of one text
ENDING = "quartz 7391 zebra, jovial 2846 fjord; "


class Truncation(NamedTuple):
    """What a server reads of a set's longest text: characters, rounded up, and tokens where it reports them; None if all.
    num_longer: texts with more characters."""

    longest: int
    characters: int | None = None
    tokens: int | None = None
    num_longer: int = 0

    def __str__(self) -> str:
        tokens = f" ({self.tokens:,} tokens)" if self.tokens else ""
        return (
            f"the server reads about {self.characters or self.longest:,} characters{tokens} of a text:"
            f" {self.num_longer:,} texts are longer, and it ignores the rest of them (text.max_chars drops them)"
        )


def recorded_truncation(
    path: Path, teacher: EndpointTeacher, chunks: Iterable[Sequence[str]], text_fingerprint: str
) -> Truncation:
    """That in the JSON file `path`, if it is of this server and text; else that of `find_truncation`, which is then written."""
    key = {"host": teacher.client.config.host, "text": text_fingerprint}
    record = read_json(path) or {}
    if {name: record.get(name) for name in key} == key:
        return Truncation(**record["found"])
    found = find_truncation(teacher, chunks)
    write_json(path, key | {"found": found._asdict()})
    return found


def find_truncation(teacher: EndpointTeacher, chunks: Iterable[Sequence[str]]) -> Truncation:
    """chunks: all texts of the set, with their prompts. Takes three requests, and about ten more if the server truncates."""
    longest, lengths = "", Counter[int]()
    for texts in chunks:
        lengths.update(map(len, texts))
        longest = max([longest, *texts], key=len)
    client, log = teacher.client, teacher.log
    read = count_read(client.embed, longest)
    if read is None:
        return Truncation(len(longest))
    before = log.own
    client.embed([longest[:read]])
    tokens = None if log.own.is_estimate else log.own.tokens - before.tokens
    return Truncation(len(longest), read, tokens, sum(count for length, count in lengths.items() if length > read))


def count_read(embed: Embed, text: str) -> int | None:
    """About how many characters of `text` a server reads, rounded up; None if its last tenth has an effect.

    embed: float32 [n, d] of n texts, of any length.
    """
    if len(text) < SHORT:
        return None
    embedded = embed([text, text])
    tolerance = max(MIN_DIFFERENCE, NOISE_MARGIN * _difference(embedded[0], embedded[1]))

    def is_read_to(end: int) -> bool:
        """Whether nothing after `end` characters is read."""
        whole, changed = embed([text, _with_other_ending(text, end)])
        return _difference(whole, changed) <= tolerance

    unread = min(int(READ_FRACTION * len(text)), len(text) - SHORT // 4)
    if not is_read_to(unread):
        return None
    read = 0
    while unread - read > max(1, RESOLUTION * unread):
        middle = (read + unread) // 2
        if is_read_to(middle):
            unread = middle
        else:
            read = middle
    return unread


def _with_other_ending(text: str, end: int) -> str:
    rest = len(text) - end
    return text[:end] + (ENDING * (rest // len(ENDING) + 1))[:rest]


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    """1 - cosine, without its cancellation: half the squared distance of the unit vectors."""
    first, second = (each.astype(np.float64) / np.linalg.norm(each.astype(np.float64)) for each in (first, second))
    return float(((first - second) ** 2).sum() / 2)
