"""A tiny task under a real DeepSpeed engine of any ZeRO stage, and all of its state put together by DeepSpeed itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.config import load_config, stage_of
from distill.run.collectives import rank, world_size
from distill.run.files import read_json
from distill.run.stage import StopRequested
from distill.run.stopping import Stopped
from distill.training.engine import build_engine, learning_rate, set_learning_rate
from distill.training.fragments import stored_parameters
from distill.training.task import Temperature
from distill.training.train_config import EngineConfig, TemperatureConfig, TrainConfig

CELLS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
CPU = torch.device("cpu")
SHIPPED = Path(__file__).parents[1] / "configs/deepspeed"
ROWS = 12  # a global batch
STEPS = 20  # of the schedule


class Tiny(nn.Module):
    """Parameters of every kind, in sizes that no number of ranks divides: trained, frozen (in the encoder or not), scalar.

    What is frozen in the encoder is the same whatever the seed, as it is in a model that is read again.
    """

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(0)
        embedding = nn.Embedding(13, 7)
        torch.manual_seed(seed)
        self.student = nn.Module()
        self.student.encoder = nn.ModuleDict({"embedding": embedding, "first": nn.Linear(7, 11), "second": nn.Linear(11, 5)})
        self.projection = nn.Linear(5, 3)
        self.temperature = Temperature(TemperatureConfig(scale=2.0))
        embedding.requires_grad_(False)
        self.projection.requires_grad_(False)

    def forward(self, tokens):
        encoder = self.student.encoder
        vectors = self.projection(encoder["second"](encoder["first"](encoder["embedding"](tokens)).tanh()))
        return (vectors * self.temperature()).sub(tokens[:, None] / 13).square().sum()


def start_deepspeed() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def embed_text(config: Path) -> Path:
    """Runs the precompute stage of a config in this process; returns the config."""
    assert stage_of(load_config(config), "precompute").run(CPU)
    return config


def train_stage(
    config: Path, stage: str, overrides: Sequence[str] = (), stop_requested: StopRequested = lambda step: False
) -> dict[str, Any] | str:
    """Runs a training stage on the ranks of this process group; its results, or the message of a requested stop."""
    start_deepspeed()
    loaded = load_config(config, list(overrides))
    try:
        stage_of(loaded, stage).run(CPU, stop_requested)
    except Stopped as stopped:
        return str(stopped)
    done = read_json(loaded.run_dir / stage / "DONE.json")
    assert done is not None
    return done["results"]


def new_engine(cell: str, folder: Path, *, seed: int = 1, clip: float = 1.0, num_micro: int = 1) -> Any:
    """An engine with a shipped DeepSpeed configuration; under ZeRO-3 all but the smallest parameters are partitioned."""
    start_deepspeed()
    settings = json.loads((SHIPPED / f"{cell}.json").read_text())
    if "zero3" in cell:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 12
    path = folder / f"{cell}-{rank()}-of-{world_size()}.json"
    path.write_text(json.dumps(settings))
    train = TrainConfig(lr=0.05, weight_decay=0.1, clip=clip, micro_batch=ROWS)
    return build_engine(Tiny(seed), train, EngineConfig(deepspeed=path), num_micro=num_micro, temperature_lr=0.01)


def train_steps(engine: Any, steps, spoiled: tuple[int, ...] = ()) -> list[float]:
    """Takes steps; in the `spoiled` ones, the last rank's loss is NaN. Returns this rank's losses."""
    losses = []
    for step in steps:
        set_learning_rate(engine, learning_rate(step, STEPS, TrainConfig(lr=0.05)))
        tokens = (torch.arange(ROWS) * (step + 3) + step) % 13
        num_micro = engine.gradient_accumulation_steps()
        for part in tokens[rank() :: world_size()].chunk(num_micro):
            loss = engine(part) * (world_size() * num_micro / ROWS)
            if step in spoiled and rank() == world_size() - 1:
                loss = loss * float("nan")
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    return losses


def full_state(engine: Any) -> dict[str, np.ndarray]:
    """Every master value and Adam's state, and the parameters that the forward pass uses, gathered on every rank."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed links them after the first group's step, too early
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in stored_parameters(engine).items():
        if parameter.requires_grad and stage == 0:
            found |= {f"{key}/{name}": engine.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
        elif parameter.requires_grad:
            found[f"master/{name}"] = safe_get_full_fp32_param(parameter)
            found |= {f"{key}/{name}": safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        for name, parameter in engine.module.named_parameters():
            found[f"used/{name}"] = parameter.detach()
            found.setdefault(f"master/{name}", parameter.detach())
        return {name: value.detach().float().numpy().reshape(-1).copy() for name, value in found.items()}
