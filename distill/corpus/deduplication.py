"""The status of each text (kept, duplicate, held out, not sampled), from hashes alone, with one bucket in memory at a time."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
from tqdm import tqdm

from distill.corpus.spool import RECORD, Spool
from distill.corpus.text import is_held_out
from distill.run.files import naming
from distill.run.sampling import splitmix64

KEPT, DUPLICATE, HELD_OUT, HELD_OUT_UNUSED, NOT_SAMPLED = range(5)
_STATUS_NAMES = ("duplicates", "held_out", "held_out_unused", "not_sampled", "kept")
_RANK_BITS = 16


def deduplicate(spool: Spool, num_texts: int, max_held_out: int, max_kept: int | None) -> tuple[dict[str, int], np.ndarray]:
    """Writes spool.statuses; returns the number of texts of each status, and the held-out texts' places [num_held_out] int64,
    by ascending hash.

    The first of equal texts is kept. Of those with a held-out hash, the `max_held_out` of smallest hash are HELD_OUT. Of the
    rest, the `max_kept` of smallest splitmix64(hash) are KEPT: a uniform sample that does not depend on the order.
    """
    if not num_texts:
        return dict.fromkeys(_STATUS_NAMES, 0), np.empty(0, np.int64)
    with naming(spool.statuses), spool.statuses.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, num_texts)  # zeros; a mapped file that meets a full disk would kill the process
    statuses = np.memmap(spool.statuses, np.uint8, "r+", shape=(num_texts,))
    counts = Counter(dict.fromkeys(_STATUS_NAMES, 0))
    held_out_places = []
    histogram = np.zeros(1 << _RANK_BITS, np.int64)
    for path in tqdm(spool.buckets, desc="finding duplicates", unit=" buckets", disable=None):
        unique, duplicates = _first_of_each(np.fromfile(path, RECORD))
        statuses[duplicates] = DUPLICATE
        held_out = is_held_out(unique["hash"].view(np.int64))
        places = unique["place"][held_out]
        statuses[places] = HELD_OUT_UNUSED
        chosen = places[: max_held_out - counts["held_out"]]
        statuses[chosen] = HELD_OUT
        held_out_places.append(chosen)
        counts["duplicates"] += len(duplicates)
        counts["held_out"] += len(chosen)
        counts["held_out_unused"] += len(places) - len(chosen)
        counts["kept"] += len(unique) - len(places)
        histogram += np.bincount(_leading_bits(splitmix64(unique["hash"][~held_out])), minlength=len(histogram))
    if max_kept is not None and max_kept < counts["kept"]:
        _sample(spool, statuses, histogram, max_kept)
        counts["not_sampled"] = counts["kept"] - max_kept
        counts["kept"] = max_kept
    statuses.flush()
    return counts, np.concatenate(held_out_places)


def _sample(spool: Spool, statuses: np.ndarray, histogram: np.ndarray, max_kept: int) -> None:
    """Marks all but the `max_kept` KEPT texts of smallest rank as NOT_SAMPLED.

    The histogram of the ranks' leading bits gives the leading bits of the limit; only ranks that share them are held in memory.
    """
    cumulative = np.cumsum(histogram)
    limit = int(np.searchsorted(cumulative, max_kept, side="left"))
    near_ranks, near_places = [], []
    for path in tqdm(spool.buckets, desc="sampling", unit=" buckets", disable=None):
        records = np.fromfile(path, RECORD)
        records = records[statuses[records["place"]] == KEPT]
        ranks = splitmix64(records["hash"])
        leading = _leading_bits(ranks)
        statuses[records["place"][leading > limit]] = NOT_SAMPLED
        near_ranks.append(ranks[leading == limit])
        near_places.append(records["place"][leading == limit])
    num_wanted = max_kept - int(cumulative[limit] - histogram[limit])
    by_rank = np.argsort(np.concatenate(near_ranks))
    statuses[np.concatenate(near_places)[by_rank[num_wanted:]]] = NOT_SAMPLED


def _first_of_each(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(records of first occurrences, by ascending hash; places of all others), from records by ascending place."""
    ordered = records[np.argsort(records["hash"], kind="stable")]
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered["hash"][1:] != ordered["hash"][:-1]
    return ordered[is_first], ordered["place"][~is_first]


def _leading_bits(ranks: np.ndarray) -> np.ndarray:
    return (ranks >> np.uint64(64 - _RANK_BITS)).astype(np.int64)
