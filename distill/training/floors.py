"""The floor of a loss: the line that its curve is read against.

congen           the entropy of the soft labels: no student goes below it; relational too
ckd              what a student would have whose every vector is the teacher's own. No bound: a student may step away from
                 negatives that the teacher keeps near, and go below it
cosine, mse, pca, teacher      0
contrast         log(1 + (N-1) exp(-2a)), a positive at cosine 1 and all N-1 negatives at -1: no student goes below it,
                 but where negatives are masked
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from distill.config import KeysConfig
from distill.training.batches import MicroBatch
from distill.training.keys import Keys, Masking

SAMPLE = 128  # rows of a global batch that floors are measured on: a second pass over all keys is dear


@torch.no_grad()
def measured_floors(terms: set[str], config: KeysConfig, scale: Tensor, micro: MicroBatch, keys: Keys) -> dict[str, Tensor]:
    """floor/ckd and floor/congen of each sampled row, for those of `terms`; their sums over a global batch's rows are those of
    all its rows. micro.teacher is as keys are. The rows are the same at any world size; a collective where the queue is spread.
    """
    total = len(keys.vectors)
    stride = -(-total // SAMPLE)
    chosen = micro.positions % stride == 0
    part = replace(
        micro, **{name: getattr(micro, name)[chosen] for name in ("positions", "teacher", "hashes")}
    )  # most_rows stays: ranks pad to it
    teacher_bd = part.teacher.float()
    sharpness = {"ckd": scale.detach().float(), "congen": scale.new_tensor([1 / config.teacher_temperature])}
    kinds = [name for name in ("ckd", "congen") if name in terms]
    masking = Masking(config.same_meaning) if "ckd" in terms else None
    scales = torch.cat([sharpness[name] for name in kinds])
    lse, attended = keys.attend(torch.stack([teacher_bd] * len(kinds)), scales, part, masking, config.tile)
    num_sampled = -(-total // stride)
    floors: dict[str, Tensor] = {}
    for name, scale_of, lse_b, attended_bd in zip(kinds, scales, lse, attended, strict=True):
        target_bd = teacher_bd if name == "ckd" else attended_bd
        floors[f"floor/{name}"] = (lse_b - scale_of * (teacher_bd * target_bd).sum(dim=1)) * (total / num_sampled)
    return floors


def contrast_floor(scale: float, num_candidates: int) -> float:
    return math.log1p((num_candidates - 1) * math.exp(-2 * scale))
