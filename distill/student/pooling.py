"""Token states to one vector per text; padding is ignored.

    mean, cls, max       over the tokens of the last layer; cls is the first
    lasttoken            the last
    weightedmean         the mean with weights 1, 2, 3, ... (SGPT)
    mean_sqrt_len_tokens the sum over the square root of the number of tokens
    mean+max, ...        several of the above, side by side: [B, 2 d]
    pooler               the encoder's own dense + tanh over the first token
    first_last_mean, last2_mean, last4_mean, all_mean
                         tokens' mean of the mean of the first and the last layer, of the last two, the last four, all layers
    last4_max            the largest over tokens of the mean of the last four layers
    concat_last4_mean    tokens' mean of each of the last four layers, side by side: [B, 4 d]

The first seven are those of sentence-transformers, the last six those of DistilFACE (arXiv 2401.12472). Layers are those of the
transformer, without the embeddings below them; an encoder with fewer layers uses all it has.
"""

from __future__ import annotations

from collections.abc import Callable
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


def masked_mean(states_bld: Tensor, mask_bl: Tensor) -> Tensor:
    """The mean over the tokens of the mask: [B, L, d] and [B, L] -> [B, d] in float32."""
    weights_bl1 = mask_bl.unsqueeze(-1).to(torch.float32)
    return (states_bld.to(torch.float32) * weights_bl1).sum(dim=1) / weights_bl1.sum(dim=1).clamp(min=1)


def masked_max(states_bld: Tensor, mask_bl: Tensor) -> Tensor:
    """The largest of each dimension over the tokens of the mask: [B, L, d] and [B, L] -> [B, d] in float32."""
    outside_bl1 = mask_bl.unsqueeze(-1) == 0
    return states_bld.to(torch.float32).masked_fill(outside_bl1, -torch.inf).amax(dim=1)


def _mean_sqrt_length(states_bld: Tensor, mask_bl: Tensor) -> Tensor:
    return masked_mean(states_bld, mask_bl) * mask_bl.sum(dim=1, keepdim=True).to(torch.float32).sqrt()


def _weighted_mean(states_bld: Tensor, mask_bl: Tensor) -> Tensor:
    weights_bl1 = (mask_bl * _positions(mask_bl)).unsqueeze(-1).to(torch.float32)
    return (states_bld.to(torch.float32) * weights_bl1).sum(dim=1) / weights_bl1.sum(dim=1).clamp(min=1)


def _first_token(states_bld: Tensor, mask_bl: Tensor) -> Tensor:
    """Of the mask: without a prompt that the pooling leaves out, of the text."""
    return _at(states_bld, (mask_bl * (mask_bl.shape[1] + 1 - _positions(mask_bl))).argmax(dim=1))


def _last_token(states_bld: Tensor, mask_bl: Tensor) -> Tensor:
    return _at(states_bld, (mask_bl * _positions(mask_bl)).argmax(dim=1))


def _positions(mask_bl: Tensor) -> Tensor:
    """1, 2, ..., L."""
    return torch.arange(1, mask_bl.shape[1] + 1, device=mask_bl.device)


def _at(states_bld: Tensor, index_b: Tensor) -> Tensor:
    """The states at one position of each text: [B, L, d] and [B] -> [B, d] in float32."""
    index_b1d = index_b[:, None, None].expand(-1, 1, states_bld.shape[-1])
    return states_bld.gather(1, index_b1d)[:, 0].to(torch.float32)


OVER_TOKENS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first_token,
    "max": masked_max,
    "mean": masked_mean,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
"""sentence-transformers' modes, in the order in which it concatenates several."""


def modes_of(pooling: str) -> list[str]:
    """The modes of OVER_TOKENS whose vectors lie side by side, in their order; [] for another pooling."""
    modes = pooling.split("+")
    return modes if all(mode in OVER_TOKENS for mode in modes) else []


def pool(pooling: str, output: Any, attention_mask_bl: Tensor, pooling_mask_bl: Tensor | None = None) -> Tensor:
    """The text vectors, float32 [B, pooled_width], from an encoder's output.

    pooling_mask: the tokens that are pooled, where they are not all that are no padding, as without a prompt.
    Poolings of NEEDS_HIDDEN_STATES need `output.hidden_states`.
    """
    mask_bl = attention_mask_bl if pooling_mask_bl is None else pooling_mask_bl
    if pooling == "cls" and pooling_mask_bl is None:
        return output.last_hidden_state[:, 0].to(torch.float32)
    if pooling == "pooler":
        return output.pooler_output.to(torch.float32)
    if pooling == "concat_last4_mean":
        layers = SLICES[pooling](output.hidden_states[1:])
        return torch.cat([masked_mean(states, mask_bl) for states in layers], dim=-1)
    if pooling in SLICES:
        layers = SLICES[pooling](output.hidden_states[1:])
        states_bld = torch.stack([states.to(torch.float32) for states in layers]).mean(dim=0)
        return (masked_max if pooling.endswith("max") else masked_mean)(states_bld, mask_bl)
    vectors = [OVER_TOKENS[mode](output.last_hidden_state, mask_bl) for mode in modes_of(pooling)]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


def pooled_width(pooling: str, hidden_size: int, num_layers: int) -> int:
    """The d of `pool`'s [B, d]."""
    if pooling == "concat_last4_mean":
        return hidden_size * min(4, num_layers)
    return hidden_size * max(1, len(modes_of(pooling)))
