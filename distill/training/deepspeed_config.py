"""The DeepSpeed configuration that `engine.deepspeed` names: how ZeRO splits states over ranks and communicates, nothing else.

The optimizer, its schedule, the batch and the precision are the run's own config; a file that has them too is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import distill
from distill.run.config import ConfigError, StrictModel, validate

WHOSE = {  # top-level keys of DeepSpeed -> the keys of a run's config that decide instead
    "train_batch_size": "a stage's global_batch",
    "train_micro_batch_size_per_gpu": "a stage's micro_batch",
    "gradient_accumulation_steps": "a stage's global_batch and micro_batch",
    "optimizer": "a stage's lr, betas, eps and weight_decay",
    "scheduler": "a stage's lr and warmup",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "bfloat16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
}


class OffloadConfig(StrictModel):
    """What is kept in the machine's memory."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True
    buffer_count: int = Field(4, ge=0)
    buffer_size: int = Field(100_000_000, ge=0)
    max_in_cpu: int = Field(1_000_000_000, ge=0)
    fast_init: bool = False


class ZeroConfig(StrictModel):
    """The section zero_optimization. Sizes are in elements."""

    stage: Literal[0, 1, 2, 3] = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, gt=0)
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, gt=0)
    overlap_comm: bool | None = None
    offload_param: OffloadConfig | None = None
    offload_optimizer: OffloadConfig | None = None
    sub_group_size: int = Field(1_000_000_000, gt=0)
    ignore_unused_parameters: bool = True
    round_robin_gradients: Literal[False] = False
    mics_shard_size: int = Field(-1, le=0)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0)
    stage3_model_persistence_threshold: int = Field(2**63 - 1, ge=0)
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0)
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: int = 0
    stage3_use_all_reduce_for_fetch_params: bool = False


class DeepSpeedConfig(StrictModel):
    """The keys that a file may have."""

    zero_optimization: ZeroConfig = ZeroConfig()
    gradient_clipping: Literal[0] = 0  # a stage's clip decides
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0)
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    comms_logger: dict[str, Any] | None = None
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: Literal[False] = False  # AdamW is torch's, offloaded too
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    steps_per_print: int | None = Field(None, gt=0)


def find_deepspeed_config(path: Path) -> Path:
    """`path` from here, or from the root of the project. Raises ValueError naming those there are."""
    shipped = Path(distill.__file__).parents[1]
    for candidate in (path, shipped / path):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in (shipped / "configs" / "deepspeed").glob("*.json")))
    raise ValueError(f"engine.deepspeed: no DeepSpeed configuration at {path}; configs/deepspeed has {known}")


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """The keys of the file at `path`, from here or from the root of the project, as DeepSpeed takes them.

    Raises ValueError with the file, the key and what decides instead for whatever is not in `DeepSpeedConfig`.
    """
    found = find_deepspeed_config(path)
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{found} is not JSON ({error}); it has no comments, and no comma after a last entry") from None
    if not isinstance(settings, dict):
        raise ConfigError(f'{found} is JSON, but no object {{"zero_optimization": ...}}')
    for key in filter(WHOSE.__contains__, settings):
        raise ConfigError(f"{found}: {key} is not read from this file; {WHOSE[key]} in the run's config decides: leave it out")
    if isinstance(zero := settings.get("zero_optimization"), dict):
        if automatic := [key for key, value in zero.items() if value == "auto"]:
            raise ConfigError(
                f'{found}: zero_optimization.{automatic[0]} is "auto", which DeepSpeed does not know; give a value'
            )
        _check_checkpoints_can_read(zero, found)
    if settings.get("gradient_clipping"):
        raise ConfigError(f"{found}: gradient_clipping is not read from this file; a stage's clip decides: leave it out")
    validate(DeepSpeedConfig, settings, found)
    return {"zero_force_ds_cpu_optimizer": False} | settings


def _check_checkpoints_can_read(zero: dict[str, Any], path: Path) -> None:
    """Raises ValueError for layouts in which `fragments.py` would look in the wrong place."""
    for offload in ("offload_optimizer", "offload_param"):
        if isinstance(section := zero.get(offload), dict) and section.get("device") == "nvme":
            raise ConfigError(f"{path}: checkpoints cannot read {offload} on nvme; offload to cpu")
    if zero.get("round_robin_gradients"):
        raise ConfigError(f"{path}: checkpoints cannot read what round_robin_gradients reorders; set it to false")
    if isinstance(size := zero.get("mics_shard_size"), int) and size > 0:
        raise ConfigError(f"{path}: checkpoints cannot read what mics_shard_size spreads over some ranks; leave it out")
