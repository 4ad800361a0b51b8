"""DeepSpeed around a task: ZeRO, parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distill.run.collectives import rank
from distill.training.deepspeed_config import read_deepspeed_config
from distill.training.train_config import EngineConfig, TrainConfig

OWN_LR_PREFIX = "logit_scale"


class CheckedAdamW(torch.optim.AdamW):
    """AdamW with what ZeRO's optimizers add, for ZeRO 0: clips, and skips the step if the gradient's norm is not finite.

    Every rank has the reduced gradient, so that all decide the same. DeepSpeed reads `overflow` and `_global_grad_norm`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self.clip = clip
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        if self.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        super().step()


def build_engine(task: nn.Module, train: TrainConfig, config: EngineConfig, *, num_micro: int, temperature_lr: float) -> Any:
    """The DeepSpeed engine of a task whose forward returns the loss of a micro-batch.

    Parameter groups: matrices (weight decay), the rest (none), the temperature (its own rate). Each group's rate is
    `lr_ratio` x the stage's rate of the step, which `set_learning_rate` sets. A step whose gradient's norm is not finite is
    skipped on all ranks, under every ZeRO stage: `engine.was_step_applied()` is then False.
    """
    settings = read_deepspeed_config(config.deepspeed)
    settings["train_micro_batch_size_per_gpu"] = train.micro_batch
    settings["gradient_accumulation_steps"] = num_micro
    is_zero = settings.get("zero_optimization", {}).get("stage", 0) > 0
    settings["gradient_clipping"] = train.clip if is_zero else 0.0
    named = [(name, parameter) for name, parameter in task.named_parameters() if parameter.requires_grad]
    scale = [p for name, p in named if name.split(".")[-1].startswith(OWN_LR_PREFIX)]
    matrices = [p for name, p in named if p.ndim >= 2]
    vectors = [p for name, p in named if p.ndim < 2 and not name.split(".")[-1].startswith(OWN_LR_PREFIX)]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay, "lr_ratio": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": 1.0},
        {"params": scale, "weight_decay": 0.0, "lr_ratio": temperature_lr / train.lr},
    ]
    groups = [group for group in groups if group["params"]]
    adam: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "fused": True}
    optimizer = torch.optim.AdamW(groups, **adam) if is_zero else CheckedAdamW(groups, clip=train.clip, **adam)
    import deepspeed  # takes seconds, and a command that does not train needs none of it

    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """Linear from 0 over the first `warmup` fraction of steps, then half a cosine to 0."""
    warmup_steps = math.ceil(train.warmup * num_steps)
    if step < warmup_steps:
        return train.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def has_finite_weights(engine: Any) -> bool:
    """Whether all values of the parameters, under ZeRO 3 of this rank's parts of them, are finite."""
    return all(bool(_own_part(parameter).isfinite().all()) for parameter in engine.module.parameters())


def _own_part(parameter: Any) -> Tensor:
    """This rank's values of a parameter: under ZeRO 3 its part without the padding, which DeepSpeed leaves uninitialised."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    if hasattr(parameter, "ds_tensor"):
        part = part[: max(0, parameter.ds_numel - rank() * part.numel())]
    return part


def gradient_norm(engine: Any) -> float | None:
    """The norm before clipping of the last step, where the ZeRO stage reports it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def whole_state(engine: Any) -> dict[str, Tensor]:
    """The task's parameters, whole, on the CPU of rank 0 and empty elsewhere; gathers them under ZeRO-3. All ranks call it."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    state: dict[str, Tensor] = {}
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        if engine.global_rank == 0:
            state = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
            kept = engine.module.state_dict().keys()
            state |= {n: buffer.detach().cpu().clone() for n, buffer in engine.module.named_buffers() if n in kept}
    return state
