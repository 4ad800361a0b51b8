"""The teacher's score on STS-B's dev set, which the student's is compared with during training."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import IO

import numpy as np
import torch

from distill.corpus.evaluation_sets import read_sts_dev, sts_dev_fingerprint
from distill.metrics.sts import Pairs, dev_score
from distill.metrics.vectors import Encode
from distill.run.collectives import from_rank_0, rank
from distill.run.files import read_json, write_json

logger = logging.getLogger(__name__)
TEACHER_DEV = "teacher_dev.json"  # in precompute/: {"sts": evaluate.sts, "content": of its dev set, "STSB-dev": ..}


def read_dev_score(directory: Path, sts: str | None) -> float | None:
    """The score on the dev set of `sts` as it is now; None if it has not been computed."""
    recorded = read_json(directory / TEACHER_DEV) or {}
    if sts is None or recorded.get("sts") != sts:
        return None
    content = sts_dev_fingerprint(sts)  # '' for the hub without a connection: the set counts as unchanged
    return recorded["STSB-dev"] if content in ("", recorded.get("content")) else None


def lacks_dev_score(directory: Path, sts: str | None) -> bool:
    """Whether the score on the dev set of `sts` has not been computed."""
    return sts is not None and read_dev_score(directory, sts) is None


def write_dev_score(directory: Path, sts: str | None, encode: Encode, device: torch.device) -> None:
    """Computes the score and writes it to <directory>/teacher_dev.json, unless it is there already or there is no dev set.

    sts: the value of evaluate.sts: a folder, "hub" or None. Only one of several concurrent precompute tasks computes the score;
    the ranks of a sharded teacher compute it together.
    """
    with (directory / ".teacher_dev.lock").open("w") as lock:
        pairs = from_rank_0(_pairs(directory, sts, lock) if rank() == 0 else None, device)
        if pairs is None:
            return
        first, second, gold, content = pairs
        value = dev_score(encode, Pairs(first, second, np.array(gold)))
        if rank() == 0:
            write_json(directory / TEACHER_DEV, {"sts": sts, "content": content, "STSB-dev": value})


def _pairs(directory: Path, sts: str | None, lock: IO[str]) -> tuple[list[str], list[str], list[float], str] | None:
    """The dev set and the digest of its content, JSON-able, if its score is missing and no other task computes it.

    Warns if it cannot be read.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if sts is None or not lacks_dev_score(directory, sts):
            return None
        content, pairs = sts_dev_fingerprint(sts), read_sts_dev(sts)
    except BlockingIOError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("precompute: no teacher score on STS-B's dev set: %s", error)
        return None
    return None if pairs is None else (pairs.first, pairs.second, pairs.gold.tolist(), content)
