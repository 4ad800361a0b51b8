"""The scale of a contrast with the teacher's vectors at which its minimum is the teacher's own vectors.

    L_i(a) = log( 1 + (K - 1) mean_{j != i} exp(a (t_i.t_j - 1)) )        K: the number of keys, a: the scale

is the loss of a student that equals the teacher. Where the teacher's vectors lie close together, as with E5 or a [CLS] pooling,
it is far above 0 at the usual scale of 20: the contrast then moves the student away from the teacher, to spread its vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST_SCALE = 20.0
STEP = 5.0
SMALL_LOSS = 0.002
QUERIES = 512  # of the sample


def fitting_scale(teacher: Tensor, num_keys: int, highest: float, same_meaning: float | None = None) -> float:
    """The lowest multiple of 5, from 20 to `highest`, at which the median of L_i is at most 0.002; `highest` if there is none.

    teacher [n, d]: a sample of the keys, L2-normalised, any float dtype. same_meaning: as for `ckd_loss`. The median, since
    texts that are nearly the same have a high loss at any scale.
    """
    vectors = teacher.double()
    queries = torch.arange(0, len(vectors), max(1, len(vectors) // QUERIES))
    cosines = vectors[queries] @ vectors.T
    if same_meaning is not None:
        cosines = cosines.masked_fill(cosines >= same_meaning, -torch.inf)
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    scale = min(LOWEST_SCALE, highest)
    while scale < highest:
        mean = (scale * (cosines - 1)).exp().sum(dim=1) / max(1, len(vectors) - 1)
        if torch.log1p((num_keys - 1) * mean).median() <= SMALL_LOSS:
            break
        scale = min(scale + STEP, highest)
    return scale
