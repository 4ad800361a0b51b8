"""The teacher's own score on STS-B's dev set: the line that the student's is drawn against while it is trained."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from distill.config import RunConfig
from distill.files import write_json
from distill.stages import read_json
from distill.training.distributed import from_rank_0, rank

if TYPE_CHECKING:  # evaluation's libraries cost every task of a precompute 250 MB and four seconds
    from distill.evaluation.encode import Encode

TEACHER_DEV = "teacher_dev.json"  # in precompute/: {"sts": evaluate.sts, "STSB-dev": ..}


def keep_dev_score(config: RunConfig, encode: Encode, device: torch.device) -> None:
    """Writes precompute/teacher_dev.json while the teacher is loaded anyway, unless it is there, if evaluate.sts has a dev set.

    Of several tasks, one does; the ranks of a teacher that is spread over them do it together.
    """
    path = config.precompute_dir / TEACHER_DEV
    with (config.precompute_dir / ".teacher_dev.lock").open("w") as lock:
        told = from_rank_0(_pairs(config.evaluate.sts, path, lock) if rank() == 0 else None, device)
        if told is None:
            return
        from distill.evaluation.sts import Pairs, dev_score

        first, second, gold = told
        value = dev_score(encode, Pairs(first, second, np.array(gold)))
        if rank() == 0:
            write_json(path, {"sts": config.evaluate.sts, "STSB-dev": value})


def _pairs(sts: str | None, path: Path, lock: IO[str]) -> tuple[list[str], list[str], list[float]] | None:
    """The dev set, JSON-able, if its score is wanted and nobody else is at it. One that cannot be read is said, no more."""
    if sts is None or (read_json(path) or {}).get("sts") == sts:
        return None
    from distill.evaluation.sts import read_dev

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pairs = read_dev(sts)
    except BlockingIOError:
        return None
    except (ValueError, OSError) as error:
        print(f"precompute: without the teacher's own line on STS-B's dev set: {error}", file=sys.stderr, flush=True)
        return None
    return None if pairs is None else (pairs.first, pairs.second, pairs.gold.tolist())
