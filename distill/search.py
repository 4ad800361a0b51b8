"""Search over a run's own text: exact, by cosine, with the student's compact vectors and with the teacher's beside them.

The student's vectors of the text are made once, by the evaluate stage, into evaluate/index.npy (fp16, normalised); the
teacher's are in the shards already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distill.config import RunConfig
from distill.evaluation.encode import Encode, unit
from distill.files import publish
from distill.shards import ShardReader

ROWS_A_BATCH = 2048


def build_index(config: RunConfig, reader: ShardReader, encode: Encode, directory: Path) -> None:
    """Writes the vectors of the first `search.max_sentences` sentences of the text, [n, dim] fp16, to directory/index.npy."""
    count = min(len(reader), config.search.max_sentences)
    parts = []
    with tqdm(total=count, desc="search index", unit="sentence", disable=None) as bar:
        for start in range(0, count, ROWS_A_BATCH):
            texts = reader.texts(np.arange(start, min(start + ROWS_A_BATCH, count)))
            parts.append(unit(encode(texts)).astype(np.float16))
            bar.update(len(texts))
    with publish(directory / "index.npy") as file:
        np.lib.format.write_array(file, np.concatenate(parts), allow_pickle=False)


@dataclass(frozen=True)
class Hit:
    score: float
    row: int
    text: str


class Index:
    """Vectors [n, dim] of the rows 0 .. n-1 of a shard set, held in float32."""

    def __init__(self, vectors: np.ndarray, reader: ShardReader) -> None:
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.reader = reader

    def search(self, query: np.ndarray, count: int) -> list[Hit]:
        """The `count` nearest sentences to one vector [dim], best first."""
        scores = self.vectors @ unit(query[None])[0].astype(np.float32)
        nearest = np.argpartition(-scores, min(count, len(scores) - 1))[:count]
        nearest = nearest[np.argsort(-scores[nearest], kind="stable")]
        texts = self.reader.texts(nearest)
        return [Hit(float(scores[row]), int(row), text) for row, text in zip(nearest, texts, strict=True)]


def open_indices(config: RunConfig) -> tuple[Index, Index]:
    """The student's and the teacher's index over the same sentences. Raises ValueError if the run has none yet."""
    path = config.run_dir / "evaluate" / "index.npy"
    if not (path.with_name("DONE.json").is_file() and path.is_file()):
        raise ValueError(f"nothing to search in {config.run_dir}: no {path}; run the pipeline to its evaluate stage first")
    reader = ShardReader(config.shards_dir)
    compact = np.load(path, allow_pickle=False)
    return Index(compact, reader), Index(reader.vectors(np.arange(len(compact))), reader)


def side_by_side(left: Sequence[Hit], right: Sequence[Hit], *, titles: tuple[str, str], width: int) -> str:
    """Two columns of answers; a sentence that both found is marked with =."""
    column = max(20, (width - 3) // 2)
    shared = {hit.row for hit in left} & {hit.row for hit in right}

    def cell(hit: Hit | None) -> str:
        if hit is None:
            return " " * column
        line = f"{'=' if hit.row in shared else ' '} {hit.score:.2f} {hit.text}"
        return (line if len(line) <= column else line[: column - 1] + "…").ljust(column)

    rows = [f"{titles[0]:<{column}} | {titles[1]}", "-" * (2 * column + 3)]
    for index in range(max(len(left), len(right))):
        pair = [hits[index] if index < len(hits) else None for hits in (left, right)]
        rows.append(f"{cell(pair[0])} | {cell(pair[1])}".rstrip())
    return "\n".join(rows)
