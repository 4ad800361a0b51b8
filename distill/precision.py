"""fp32 or bf16, by what the config says and the processor has."""

from __future__ import annotations

import torch

# cuDNN's attention makes a plan for every new shape, and texts come in hundreds of shapes
torch.backends.cuda.enable_cudnn_sdp(False)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None (float32): what `precision` means on this device. auto: bf16 where the processor has it."""
    if precision == "fp32":
        return None
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and not has_bf16:
        raise ValueError("precision bf16: this processor has no bf16 instructions; use fp32 or auto")
    return torch.bfloat16 if has_bf16 else None
