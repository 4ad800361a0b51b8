"""Token states to one vector a sentence; padding never counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_mean(states_bld: Tensor, attention_mask_bl: Tensor) -> Tensor:
    """The mean over tokens that are not padding: [B, L, d] and [B, L] -> [B, d] in float32."""
    weights_bl1 = attention_mask_bl.unsqueeze(-1).to(torch.float32)
    return (states_bld.to(torch.float32) * weights_bl1).sum(dim=1) / weights_bl1.sum(dim=1).clamp(min=1)


def pool(pooling: str, output: Any, attention_mask_bl: Tensor) -> Tensor:
    """A sentence vector [B, d], float32, from an encoder's output.

    mean, cls: of the last layer. pooler: the encoder's own dense + tanh over [CLS]. last4_mean: tokens' mean of the mean of the
    last four layers. first_last_mean: of the first and the last layer. The last two need `output.hidden_states`.
    """
    if pooling == "mean":
        return masked_mean(output.last_hidden_state, attention_mask_bl)
    if pooling == "cls":
        return output.last_hidden_state[:, 0].to(torch.float32)
    if pooling == "pooler":
        return output.pooler_output.to(torch.float32)
    layers = output.hidden_states[1:]
    chosen = layers[-4:] if pooling == "last4_mean" else (layers[0], layers[-1])
    return masked_mean(torch.stack([states.to(torch.float32) for states in chosen]).mean(dim=0), attention_mask_bl)


NEEDS_HIDDEN_STATES = frozenset({"last4_mean", "first_last_mean"})
