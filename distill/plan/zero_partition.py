"""How DeepSpeed's ZeRO stages partition parameters, gradients and optimizer state over ranks, in numbers of elements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from distill.plan.shapes import Parameter
from distill.training.deepspeed_config import read_deepspeed_config


class ZeroSettings(BaseModel):
    """The section zero_optimization of a DeepSpeed configuration, with DeepSpeed's defaults. Sizes are in elements."""

    model_config = ConfigDict(frozen=True)

    stage: int = 0
    reduce_bucket_size: float = 5e8
    stage3_prefetch_bucket_size: float = 5e7
    stage3_param_persistence_threshold: float = 1e5
    stage3_max_live_parameters: float = 1e9
    stage3_max_reuse_distance: float = 1e9
    offload_optimizer: dict[str, Any] | None = None
    offload_param: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: Path) -> ZeroSettings:
        """Raises ValueError as `read_deepspeed_config`."""
        return cls.model_validate(read_deepspeed_config(path).get("zero_optimization", {}))

    @property
    def offloads_optimizer(self) -> bool:
        return (self.offload_optimizer or {}).get("device") == "cpu"

    @property
    def offloads_parameters(self) -> bool:
        return (self.offload_param or {}).get("device") == "cpu"

    def is_persistent(self, parameter: Parameter) -> bool:
        """Whether ZeRO 3 keeps this parameter whole on every rank."""
        return parameter.numel <= self.stage3_param_persistence_threshold


def padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def partition_size(parameters: Sequence[Parameter], stage: int, ranks: int) -> int:
    """Trained elements that a rank updates, with padding: of each tensor to a multiple of W (ZeRO 3), of each group of the
    optimizer to a multiple of 2 W (ZeRO 1, 2)."""
    if stage == 0:
        return sum(p.numel for p in parameters if p.is_trained)
    if stage == 3:
        return sum(padded(p.numel, ranks) // ranks for p in parameters if p.is_trained)
    return sum(padded(sum(sizes), 2 * ranks) // ranks for sizes in _trained_groups(parameters))


def gradient_partition_sizes(parameters: Sequence[Parameter], ranks: int) -> np.ndarray:
    """Elements of the gradients that each rank holds under ZeRO 2, [ranks] int64: of whole tensors of which any element lies in
    its partition."""
    held = np.zeros(ranks, dtype=np.int64)
    for sizes in _trained_groups(parameters):
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        part = padded(sum(sizes), 2 * ranks) // ranks
        begins = np.arange(ranks) * part
        first = np.searchsorted(offsets[1:], begins, side="right")  # tensor that ends after the partition begins
        last = np.searchsorted(offsets[:-1], begins + part)  # and the first that begins after its end
        held += offsets[last] - offsets[first]
    return held


def _trained_groups(parameters: Sequence[Parameter]) -> list[list[int]]:
    """The sizes of the trained tensors in each group of the optimizer."""
    trained = [p for p in parameters if p.is_trained]
    return [[p.numel for p in trained if p.group == group] for group in sorted({p.group for p in trained})]
