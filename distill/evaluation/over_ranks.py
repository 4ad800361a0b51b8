"""Encoding on all ranks together: rank 0 deals the sentences out, and is left with every vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distill.evaluation.encode import Encode
from distill.training.distributed import from_rank_0, gather_dealt_rows, rank, world_size

SENTENCES_A_BLOCK = 16_384


def encode_over_ranks(encode: Encode, sentences: Sequence[str], device: torch.device) -> np.ndarray | None:
    """Rank 0's vectors float32 [n, d] of its `sentences`, in their order; None on the others, whose `sentences` are not read.

    Rank r of W encodes every W-th sentence from r on. Vectors are gathered block by block on `device`, which is the process
    group's, so that the others never hold more than a block. To be called by all ranks, with one model.
    """
    num_sentences = from_rank_0(len(sentences) if rank() == 0 else None, device)
    gathered = []
    for start in range(0, num_sentences, SENTENCES_A_BLOCK):
        block = from_rank_0(list(sentences[start : start + SENTENCES_A_BLOCK]) if rank() == 0 else None, device)
        mine = torch.from_numpy(encode(block[rank() :: world_size()])).to(device)
        vectors = gather_dealt_rows(mine, len(block))
        if rank() == 0:
            gathered.append(vectors.cpu().numpy())
    return np.concatenate(gathered) if rank() == 0 else None
