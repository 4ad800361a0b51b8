"""Token states to one vector per text; padding is ignored.

    mean, cls, max       over the tokens of the last layer
    pooler               the encoder's own dense + tanh over [CLS]
    first_last_mean, last2_mean, last4_mean, all_mean
                         tokens' mean of the mean of the first and the last layer, of the last two, the last four, all layers
    last4_max            the largest over tokens of the mean of the last four layers
    concat_last4_mean    tokens' mean of each of the last four layers, side by side: [B, 4 d]

The poolings are those of DistilFACE (arXiv 2401.12472). Layers are those of the transformer, without the embeddings below them;
an encoder with fewer layers uses all it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICES = {
    "first_last_mean": lambda layers: [layers[0], layers[-1]],
    "last2_mean": lambda layers: layers[-2:],
    "last4_mean": lambda layers: layers[-4:],
    "last4_max": lambda layers: layers[-4:],
    "concat_last4_mean": lambda layers: layers[-4:],
    "all_mean": lambda layers: layers,
}
NEEDS_HIDDEN_STATES = frozenset(SLICES)


def masked_mean(states_bld: Tensor, attention_mask_bl: Tensor) -> Tensor:
    """The mean over tokens that are not padding: [B, L, d] and [B, L] -> [B, d] in float32."""
    weights_bl1 = attention_mask_bl.unsqueeze(-1).to(torch.float32)
    return (states_bld.to(torch.float32) * weights_bl1).sum(dim=1) / weights_bl1.sum(dim=1).clamp(min=1)


def masked_max(states_bld: Tensor, attention_mask_bl: Tensor) -> Tensor:
    """The largest of each dimension over tokens that are not padding: [B, L, d] and [B, L] -> [B, d] in float32."""
    padding_bl1 = attention_mask_bl.unsqueeze(-1) == 0
    return states_bld.to(torch.float32).masked_fill(padding_bl1, -torch.inf).amax(dim=1)


def pool(pooling: str, output: Any, attention_mask_bl: Tensor) -> Tensor:
    """The text vectors [B, d] (concat_last4_mean: [B, 4 d]), float32, from an encoder's output.

    Poolings of NEEDS_HIDDEN_STATES need `output.hidden_states`.
    """
    if pooling == "cls":
        return output.last_hidden_state[:, 0].to(torch.float32)
    if pooling == "pooler":
        return output.pooler_output.to(torch.float32)
    if pooling == "concat_last4_mean":
        layers = SLICES[pooling](output.hidden_states[1:])
        return torch.cat([masked_mean(states, attention_mask_bl) for states in layers], dim=-1)
    states_bld = output.last_hidden_state
    if pooling in SLICES:
        layers = SLICES[pooling](output.hidden_states[1:])
        states_bld = torch.stack([states.to(torch.float32) for states in layers]).mean(dim=0)
    return (masked_max if pooling.endswith("max") else masked_mean)(states_bld, attention_mask_bl)


def pooled_width(pooling: str, hidden_size: int, num_layers: int) -> int:
    """The d of `pool`'s [B, d]."""
    return hidden_size * (min(4, num_layers) if pooling == "concat_last4_mean" else 1)
