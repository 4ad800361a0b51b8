"""Search over a run's own text: exact, by cosine, with the student's compact vectors and with the teacher's.

The student's vectors of the text are made once, by the evaluate stage, into evaluate/index.npy (fp16, normalised); the
teacher's are in the shards already.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from distill.evaluation.retrieval import exact_search
from distill.metrics.vectors import RoleEncode, unit
from distill.run.recorded_array import is_saved, save_array
from distill.shards import ShardReader

INDEX = "index.npy"
ROWS_PER_BATCH = 2048


class Hit(NamedTuple):
    """score: cosine."""

    score: float
    row: int
    text: str


class PassageIndex:
    """Vectors [n, dim] of the rows 0 .. n-1 of a shard set, held in float32."""

    def __init__(self, vectors: np.ndarray, reader: ShardReader) -> None:
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.reader = reader

    def search(self, query: np.ndarray, count: int) -> list[Hit]:
        """The `count` texts nearest to one vector [dim], best first."""
        query = unit(query[None]).astype(np.float32)
        (rows,) = exact_search(query, self.vectors, count)
        scores = self.vectors[rows] @ query[0]
        return [Hit(*hit) for hit in zip(scores.tolist(), rows.tolist(), self.reader.texts(rows), strict=True)]


def build_index(reader: ShardReader, encode: RoleEncode, directory: Path, max_texts: int) -> None:
    """Writes the vectors of the first `max_texts` texts of the shards to directory/index.npy, [n, dim] fp16."""
    count = min(len(reader), max_texts)
    parts = []
    with tqdm(total=count, desc="search index", unit="text", disable=None) as bar:
        for start in range(0, count, ROWS_PER_BATCH):
            texts = reader.texts(np.arange(start, min(start + ROWS_PER_BATCH, count)))
            parts.append(unit(encode(texts, "document")).astype(np.float16))
            bar.update(len(texts))
    save_array(directory / INDEX, np.concatenate(parts))


def open_indices(run_dir: Path, shards_dir: Path) -> tuple[PassageIndex, PassageIndex]:
    """The student's and the teacher's index over the same texts. Raises ValueError if the run has none yet."""
    path = run_dir / "evaluate" / INDEX
    if not (path.with_name("DONE.json").is_file() and is_saved(path)):
        raise ValueError(f"nothing to search in {run_dir}: no {path}; run the pipeline to its evaluate stage first")
    reader = ShardReader(shards_dir)
    compact = np.load(path, allow_pickle=False)
    return PassageIndex(compact, reader), PassageIndex(reader.vectors(np.arange(len(compact))), reader)
