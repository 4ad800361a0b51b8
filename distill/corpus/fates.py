"""What becomes of each sentence, decided on hashes alone: one bucket in memory at a time, one byte a sentence on disk."""

from __future__ import annotations

from collections import Counter

import numpy as np
from tqdm import tqdm

from distill.corpus.spool import RECORD, Spool
from distill.corpus.text import is_held_out
from distill.sampling import splitmix64

KEPT, DUPLICATE, HELD_OUT, HELD_OUT_UNUSED, NOT_SAMPLED = range(5)
_FATE_NAMES = ("duplicates", "held_out", "held_out_unused", "not_sampled", "kept")
_RANK_BITS = 16


def decide_fates(
    spool: Spool, num_sentences: int, max_held_out: int, max_kept: int | None, progress: bool | None
) -> tuple[dict[str, int], np.ndarray]:
    """Writes spool.fates; returns how many have each fate, and the held-outs' places [num_held_out] int64, by ascending hash.

    The first of equal sentences stays. Of those with a held-out hash, the `max_held_out` of smallest hash are HELD_OUT. Of
    the rest, the `max_kept` of smallest splitmix64(hash) are KEPT: a uniform sample that does not depend on the order.
    """
    if not num_sentences:
        return dict.fromkeys(_FATE_NAMES, 0), np.empty(0, np.int64)
    fates = np.memmap(spool.fates, np.uint8, "w+", shape=(num_sentences,))
    counts = Counter(dict.fromkeys(_FATE_NAMES, 0))
    held_out_places = []
    histogram = np.zeros(1 << _RANK_BITS, np.int64)
    for path in tqdm(spool.buckets, desc="finding duplicates", unit=" buckets", disable=progress):
        unique, duplicates = _first_of_each(np.fromfile(path, RECORD))
        fates[duplicates] = DUPLICATE
        held_out = is_held_out(unique["hash"].view(np.int64))
        places = unique["place"][held_out]
        fates[places] = HELD_OUT_UNUSED
        chosen = places[: max_held_out - counts["held_out"]]
        fates[chosen] = HELD_OUT
        held_out_places.append(chosen)
        counts["duplicates"] += len(duplicates)
        counts["held_out"] += len(chosen)
        counts["held_out_unused"] += len(places) - len(chosen)
        counts["kept"] += len(unique) - len(places)
        histogram += np.bincount(_leading_bits(splitmix64(unique["hash"][~held_out])), minlength=len(histogram))
    if max_kept is not None and max_kept < counts["kept"]:
        _sample(spool, fates, histogram, max_kept, progress)
        counts["not_sampled"] = counts["kept"] - max_kept
        counts["kept"] = max_kept
    fates.flush()
    return counts, np.concatenate(held_out_places)


def _sample(spool: Spool, fates: np.ndarray, histogram: np.ndarray, max_kept: int, progress: bool | None) -> None:
    """Marks all but the `max_kept` KEPT sentences of smallest rank. The histogram of the ranks' leading bits tells those
    certainly below the limit from those above; only the ranks that share the limit's leading bits are held in memory."""
    cumulative = np.cumsum(histogram)
    limit = int(np.searchsorted(cumulative, max_kept, side="left"))
    near_ranks, near_places = [], []
    for path in tqdm(spool.buckets, desc="sampling", unit=" buckets", disable=progress):
        records = np.fromfile(path, RECORD)
        records = records[fates[records["place"]] == KEPT]
        ranks = splitmix64(records["hash"])
        leading = _leading_bits(ranks)
        fates[records["place"][leading > limit]] = NOT_SAMPLED
        near_ranks.append(ranks[leading == limit])
        near_places.append(records["place"][leading == limit])
    num_wanted = max_kept - int(cumulative[limit] - histogram[limit])
    by_rank = np.argsort(np.concatenate(near_ranks))
    fates[np.concatenate(near_places)[by_rank[num_wanted:]]] = NOT_SAMPLED


def _first_of_each(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(records of first occurrences, by ascending hash; places of all others), from records by ascending place."""
    ordered = records[np.argsort(records["hash"], kind="stable")]
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered["hash"][1:] != ordered["hash"][:-1]
    return ordered[is_first], ordered["place"][~is_first]


def _leading_bits(ranks: np.ndarray) -> np.ndarray:
    return (ranks >> np.uint64(64 - _RANK_BITS)).astype(np.int64)
