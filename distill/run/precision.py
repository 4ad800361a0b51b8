"""bf16 or fp32: what the config asks for, and what the device has instructions for."""

from __future__ import annotations

import platform
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "auto"]


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 instructions. Where torch emulates them, bf16 is slower than fp32 and counts as absent."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_x86 = platform.machine() in ("x86_64", "AMD64")  # there oneDNN also emulates bf16, with AVX-512 alone
    return torch.cpu._is_avx512_bf16_supported() if is_x86 else True


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None (float32): what `precision` (auto, fp32 or bf16) means on this device.

    Raises ValueError for bf16 on a device that does not have it.
    """
    if precision == "fp32":
        return None
    if has_bf16(device):
        return torch.bfloat16
    if precision == "bf16":
        raise ValueError(f"precision bf16: this {_kind(device)} has no bf16 instructions; use fp32 or auto")
    return None


def describe_precision(precision: str, device: torch.device) -> str:
    """The precision that `autocast_dtype` chooses and why: 'bf16 (auto: this processor has bf16 instructions)'."""
    chosen = "fp32" if autocast_dtype(precision, device) is None else "bf16"
    if precision != "auto":
        return f"{chosen} (as configured)"
    return f"{chosen} (auto: this {_kind(device)} has {'no ' if chosen == 'fp32' else ''}bf16 instructions)"


def _kind(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "processor"
