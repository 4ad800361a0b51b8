"""DeepSpeed around a task: ZeRO, parameter groups, and the learning rate of a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

import distill
from distill.config import EngineConfig, TrainConfig

OWN_LR_PREFIX = "logit_scale"


def find_deepspeed_config(path: Path) -> Path:
    """`path` from here, or from the root of the project. Raises ValueError naming those there are."""
    shipped = Path(distill.__file__).parents[1]
    for candidate in (path, shipped / path):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in (shipped / "configs" / "deepspeed").glob("*.json")))
    raise ValueError(f"engine.deepspeed: no DeepSpeed configuration at {path}; configs/deepspeed has {known}")


def build_engine(task: nn.Module, train: TrainConfig, config: EngineConfig, *, num_micro: int, temperature_lr: float) -> Any:
    """The DeepSpeed engine of a task whose forward returns the loss of a micro-batch.

    Parameter groups: matrices (weight decay), the rest (none), the temperature (its own rate). Each group's rate is
    `lr_ratio` x the stage's rate of the step, which `set_learning_rate` sets.
    """
    settings = json.loads(find_deepspeed_config(config.deepspeed).read_text(encoding="utf-8"))
    settings["train_micro_batch_size_per_gpu"] = train.micro_batch
    settings["gradient_accumulation_steps"] = num_micro
    settings["gradient_clipping"] = train.clip
    named = [(name, parameter) for name, parameter in task.named_parameters() if parameter.requires_grad]
    scale = [p for name, p in named if name.split(".")[-1].startswith(OWN_LR_PREFIX)]
    matrices = [p for name, p in named if p.ndim >= 2]
    vectors = [p for name, p in named if p.ndim < 2 and not name.split(".")[-1].startswith(OWN_LR_PREFIX)]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay, "lr_ratio": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": 1.0},
        {"params": scale, "weight_decay": 0.0, "lr_ratio": temperature_lr / train.lr},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.lr, betas=train.betas, eps=train.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """Linear from 0 over the first `warmup` share of steps, then half a cosine to 0."""
    warmup_steps = math.ceil(train.warmup * num_steps)
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def gradient_norm(engine: Any) -> float | None:
    """The norm before clipping of the last step, where the ZeRO stage tells it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def whole_state(engine: Any) -> dict[str, Tensor]:
    """The task's parameters, whole, on the CPU of rank 0 and empty elsewhere; gathers them under ZeRO-3. All ranks call it."""
    parameters = dict(engine.module.named_parameters())
    state: dict[str, Tensor] = {}
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        if engine.global_rank == 0:
            state = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
            kept = engine.module.state_dict().keys()
            state |= {n: buffer.detach().cpu().clone() for n, buffer in engine.module.named_buffers() if n in kept}
    return state
