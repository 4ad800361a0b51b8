"""The teacher's own score on STS-B's dev set: the line that the student's is drawn against while it is trained."""

from __future__ import annotations

import fcntl

import torch

from distill.config import RunConfig
from distill.evaluation import dev_score
from distill.evaluation.encode import Encode
from distill.evaluation.sts import read_dev
from distill.files import write_json
from distill.training.distributed import from_rank_0, rank

TEACHER_DEV = "teacher_dev.json"  # in precompute/: {"sts": evaluate.sts, "STSB-dev": ..}


def keep_dev_score(config: RunConfig, encode: Encode, device: torch.device) -> None:
    """Writes precompute/teacher_dev.json while the teacher is loaded anyway, if it is not there and evaluate.sts has a dev set.

    Of several tasks, one does; the ranks of a teacher that is spread over them do it together.
    """
    pairs = read_dev(config.evaluate.sts) if config.evaluate.sts is not None else None
    if pairs is None:
        return
    path = config.precompute_dir / TEACHER_DEV
    with (config.precompute_dir / ".teacher_dev.lock").open("w") as lock:
        is_ours = True
        if rank() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_ours = False
        if not from_rank_0(is_ours and not path.exists(), device):
            return
        value = dev_score(encode, pairs)
        if rank() == 0:
            write_json(path, {"sts": config.evaluate.sts, "STSB-dev": value})
