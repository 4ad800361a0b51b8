"""A finished run whose vectors are used again: those of this run's teacher, or of some of its encoders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.run.files import fingerprint, unseal
from distill.run.prompts import Role
from distill.shards import HELD_OUT, ShardReader
from distill.teacher.identity import ENCODER


class Prompting(NamedTuple):
    """What decides the prompt before a source's texts, beside the teacher: the role counts where no prompt is given."""

    role: Role | None
    prompt: str | None

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> Prompting:
        """Of a source, given as its config's keys; earlier versions had neither."""
        prompt = source.get("prompt")
        return cls(source.get("role") if prompt is None else None, prompt)


@dataclass(frozen=True)
class ReusedRun:
    """The shard sets of another run, its rows numbered through: those of the training set, then the held-out ones.

    fingerprint: of its shards. prompting: of each of its sources. encoders: the numbers of this teacher's encoders that made
    its vectors; in this teacher's, they are side by side and have the L2 norm `norm`. A shard is verified before it is read.
    """

    directory: Path
    fingerprint: str
    readers: list[ShardReader]
    prompting: list[Prompting]
    encoders: range
    norm: float

    def __len__(self) -> int:
        return sum(map(len, self.readers))

    def hashes(self) -> Iterator[np.ndarray]:
        """The text hashes of all rows, int64, a shard at a time."""
        for reader in self.readers:
            ends = np.cumsum(reader.shard_rows)
            for end, count in zip(ends.tolist(), reader.shard_rows.tolist(), strict=True):
                yield reader.hashes(np.arange(end - count, end))

    def are_same(self, rows: np.ndarray, texts: Sequence[str], prompting: Sequence[Prompting]) -> np.ndarray:
        """Whether the teacher read for each row what it would read for a text now: bool [n]."""
        same = np.empty(len(rows), bool)
        for reader, places, local in self._by_reader(rows):
            before = zip(reader.texts(local), reader.sources(local).tolist(), strict=True)
            same[places] = [
                text == texts[place] and self.prompting[source] == prompting[place]
                for place, (text, source) in zip(places.tolist(), before, strict=True)
            ]
        return same

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Float16 [n, d], with the norm that they have in this teacher's vectors."""
        vectors = np.empty((len(rows), self.readers[0].dim), np.float16)
        for reader, places, local in self._by_reader(rows):
            vectors[places] = reader.vectors(local)
        return vectors if self.norm == 1 else (vectors.astype(np.float32) * np.float32(self.norm)).astype(np.float16)

    def _by_reader(self, rows: np.ndarray) -> Iterator[tuple[ShardReader, np.ndarray, np.ndarray]]:
        """(reader, places in `rows`, rows of the reader) of each reader that has some."""
        start = 0
        for reader in self.readers:
            places = np.flatnonzero((rows >= start) & (rows < start + len(reader)))
            if len(places):
                yield reader, places, rows[places] - start
            start += len(reader)


def open_reused(directory: Path, identity: Mapping[str, Any]) -> ReusedRun:
    """The finished run in `directory`, for the teacher of this identity. Reads no shard and writes nothing.

    identity: without `files` where they are not compared, and with the precision 'auto' where it is not known yet.
    Raises ValueError, naming what differs, if its vectors are not of that teacher or of encoders side by side in it.
    """
    done = _read_done(directory)
    shards, sources = directory / "shards", done["settings"]["text"]["sources"]
    has_held_out = bool(done["results"]["held_out"])
    readers = [ShardReader(folder) for folder in [shards, *([shards / HELD_OUT] if has_held_out else [])]]
    in_order = [*readers[1:], readers[0]]  # as the stage records them
    if done["fingerprint"] != fingerprint({"shards": [e.sha256 for reader in in_order for e in reader.manifest.shards]}):
        raise ValueError(f"{shards} has other shards than its run made: start that run's precompute command again")
    made_by = readers[0].manifest.teacher
    encoders = _match(identity, made_by, directory)
    weights = [entry["weight"] for entry in _encoders(identity)]
    norm = (sum(weights[encoders.start : encoders.stop]) / sum(weights)) ** 0.5
    return ReusedRun(directory, done["fingerprint"], readers, [Prompting.of(source) for source in sources], encoders, norm)


def _read_done(directory: Path) -> dict[str, Any]:
    """The DONE.json of a run's precompute; one that is damaged stays where it is, since the run is another one."""
    path = directory / "precompute" / "DONE.json"
    try:
        done = unseal(path.read_bytes(), indent=1)
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no finished precompute: finish it, or name the directory of the run that made the shards"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): start that run's precompute command again") from None
    if "settings" not in done:
        raise ValueError(f"{directory} was made by an earlier version of this program, which did not record its prompts")
    return done


def _match(identity: Mapping[str, Any], made_by: Mapping[str, Any], directory: Path) -> range:
    """The numbers of the encoders of `identity` that are those of `made_by`."""
    wanted, found = _encoders(identity), _encoders(made_by)
    if len(found) > len(wanted):
        raise ValueError(
            f"{directory} was made by a teacher of {len(found)} encoders, whose vectors are not taken apart; this one has"
            f" {len(wanted)}"
        )
    changes: list[list[str]] = []
    for start in range(len(wanted) - len(found) + 1):
        these = wanted[start : start + len(found)]
        changes.append([change for pair in zip(found, these, strict=True) for change in _changes(*pair)])
        if not changes[-1] and not _have_same_weights(found, these):
            changes[-1] = [f"weights: {[e['weight'] for e in found]} there, {[e['weight'] for e in these]} here"]
        if not changes[-1]:
            return range(start, start + len(found))
    fewest = min(changes, key=len)
    raise ValueError(f"{directory} was made by another teacher ({'; '.join(fewest)})")


def _encoders(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The encoders of a teacher's identity, each with all that decides its vectors, and its weight."""
    return [
        {name: entry.get(name) for name in (*ENCODER, "files")}
        | {"precision": identity["precision"], "weight": entry.get("weight", 1.0)}
        for entry in [identity, *identity.get("concat", [])]
    ]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [*ENCODER, *(["precision"] if now["precision"] != "auto" else [])]
    changes = [f"{name}: {before[name]!r} there, {now[name]!r} here" for name in names if before[name] != now[name]]
    if now["files"] is not None and before["files"] != now["files"]:
        files = {**(before["files"] or {}), **now["files"]}
        names = sorted(name for name in files if (before["files"] or {}).get(name) != now["files"].get(name))
        changes.append(f"other files: {', '.join(names)}")
    return changes


def _have_same_weights(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> bool:
    """Whether the weights of the encoders have the same ratios."""
    sums = [sum(entry["weight"] for entry in entries) for entries in (before, now)]
    return all(math.isclose(a["weight"] / sums[0], b["weight"] / sums[1]) for a, b in zip(before, now, strict=True))
