"""The learnable temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distill.training.train_config import TemperatureConfig


class Temperature(nn.Module):
    """exp(logit_scale), never above `max_scale`; the clamp passes the gradient, so that it can come down again."""

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        # shape (1,): DeepSpeed cannot partition a parameter without dimensions
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.scale)), requires_grad=config.learnable)
        self.log_max = math.log(config.max_scale)

    def forward(self) -> Tensor:
        above = (self.logit_scale - self.log_max).clamp(min=0).detach()
        return (self.logit_scale - above).exp()
