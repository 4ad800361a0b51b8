"""A teacher that embeds only the texts whose vectors no reused run has; encoder by encoder where it has several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from distill.corpus import TextChunk
from distill.teacher.encoder import Teacher, Work
from distill.teacher.endpoint import EndpointTeacher
from distill.teacher.reused_rows import ReusedRows, missing_vectors
from distill.teacher.reused_run import ReusedRun


class Part(NamedTuple):
    """Vectors [m, d] float16 of the encoders start to stop - 1, for the texts `places` [m] of a chunk."""

    start: int
    stop: int
    places: np.ndarray
    vectors: np.ndarray


class Unread(NamedTuple):
    """What one encoder still has to embed: the texts `places` of a chunk, tokenized."""

    encoder: int
    places: np.ndarray
    read: Any  # by the encoder's teacher


class PartlyRead(NamedTuple):
    num_texts: int
    reused: list[Part]
    unread: list[Unread]


class ReusingTeacher:
    """Texts to the vectors of a teacher, with its interface. A text that is in no chunk is embedded by all encoders.

    load: the part of the teacher that is one encoder, by its number; called when the encoder is needed. rows: those of `runs`.
    """

    def __init__(
        self, load: Callable[[int], Teacher | EndpointTeacher], num_encoders: int, runs: Sequence[ReusedRun], rows: ReusedRows
    ) -> None:
        self.work = Work()
        self._num_encoders, self._runs, self._rows = num_encoders, runs, rows

        def part_of(number: int) -> Teacher | EndpointTeacher:
            teacher = load(number)
            if isinstance(teacher, Teacher):
                teacher.work = self.work
            return teacher

        self.part_of = cache(part_of)

    def read(self, chunk: TextChunk) -> PartlyRead:
        """Tokenises what is not reused, and reads the vectors that are."""
        num = len(chunk.texts)
        rows = self._rows.read(chunk.name) if chunk.name else np.full((len(self._runs), num), -1)
        reused, unread = [], []
        for run, found in zip(self._runs, rows, strict=True):
            places = np.flatnonzero(found >= 0)
            if len(places):
                reused.append(Part(run.encoders.start, run.encoders.stop, places, run.vectors(found[places])))
        missing = missing_vectors(rows, self._runs, self._num_encoders)
        for number, is_missing in enumerate(missing):
            places = np.flatnonzero(is_missing)
            if len(places):
                texts = [chunk.texts[place] for place in places.tolist()]
                some = TextChunk(texts, None, None if chunk.sources is None else chunk.sources[places])
                unread.append(Unread(number, places, self.part_of(number).read(some)))
        self.work.reused += int(np.count_nonzero(~missing.any(axis=0)))
        return PartlyRead(num, reused, unread)

    def encode(self, read: PartlyRead, tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        """Float16 [n, dim], L2-normalised, of what `read` returned; tick: as for `Teacher.encode`."""
        parts, last = list(read.reused), len(read.unread) - 1
        for number, (encoder, places, inputs) in enumerate(read.unread):
            vectors = self.part_of(encoder).encode(inputs, tick if number == last else lambda rows: None)
            parts.append(Part(encoder, encoder + 1, places, vectors))
        tick(read.num_texts - (len(read.unread[-1].places) if read.unread else 0))
        return join(parts, read.num_texts, self._num_encoders)


def join(parts: Sequence[Part], num_texts: int, num_encoders: int) -> np.ndarray:
    """The concatenated vectors [num_texts, dim] float16 from parts that together have each encoder of each text once."""
    starts = {0: 0}  # encoder -> its first dimension
    for part in sorted(parts, key=lambda part: part.start):
        starts[part.stop] = starts[part.start] + part.vectors.shape[1]
    vectors = np.empty((num_texts, starts[num_encoders]), np.float16)
    for part in parts:
        vectors[part.places, starts[part.start] : starts[part.stop]] = part.vectors
    return vectors
