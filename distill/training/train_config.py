"""What the config sections of all training stages have in common, and the section `engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from distill.run.config import FilePath, Section, result, selection, speed
from distill.run.precision import Precision

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """What every training stage has. The global batch is the config; accumulation follows from it."""

    epochs: float = result(1.0, gt=0, description="passes over the training texts; may be a fraction")
    max_steps: int | None = result(None, gt=0, description="stop after this number of steps, whatever `epochs` is")
    global_batch: int = result(256, gt=1, description="texts per step, over all ranks")
    micro_batch: int = speed(64, gt=0, description="largest number of texts in one forward and backward pass of one rank")
    lr: float = result(2e-4, gt=0, description="AdamW's highest learning rate; after the warm-up it falls to 0 as a cosine")
    betas: tuple[Decay, Decay] = result((0.9, 0.98), description="AdamW's averages of gradients and of their squares")
    eps: float = result(1e-8, gt=0, description="AdamW's, against division by 0")
    weight_decay: float = result(0.0, ge=0, description="on matrices only; not on biases, norms or the temperature")
    warmup: float = result(0.05, ge=0, lt=1, description="fraction of all steps in which the rate rises from 0")
    clip: float = result(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    merge: float | None = result(
        None,
        gt=0,
        lt=1,
        description="interpolation weight of the trained parameters, the others being those that the stage began with, so that"
        " a good encoder forgets less (WiSE-FT, LM-Cocktail); null keeps the trained ones",
    )
    dev_every: int = selection(100, gt=0, description="steps between dev evaluations")
    patience: int | None = result(None, gt=0, description="stop after this number of dev evaluations without an improvement")
    save_every: int = speed(100, gt=0, description="steps between checkpoints")
    keep: int = speed(2, ge=1, description="checkpoints kept beside the newest, to continue from if that is damaged")
    log_every: int = speed(10, gt=0, description="steps between TensorBoard points")


class TemperatureConfig(Section):
    """Logits are exp(logit_scale) * cosine; `scale` is exp(logit_scale) at the start."""

    scale: float | None = result(
        None,
        gt=0,
        description="1 / tau at the start; the paper's is e = 2.718. null: 20; where the teacher's vectors lie close together,"
        " ckd and hpd take as much more, up to max_scale, that a copy of the teacher has a loss near 0",
    )
    max_scale: float = result(100.0, gt=0, description="logit_scale is clamped here")
    learnable: bool = result(True, description="train logit_scale; else it stays at `scale`")
    lr: float | None = result(None, gt=0, description="its own learning rate; null takes the stage's")

    @model_validator(mode="after")
    def _starts_below_its_clamp(self) -> TemperatureConfig:
        if (self.scale or 0.0) > self.max_scale:
            raise ValueError(f"scale {self.scale} is above max_scale {self.max_scale}")
        return self


class EngineConfig(Section):
    """How training is spread over ranks: it changes speed and memory, and the student by no more than rounding."""

    deepspeed: FilePath = speed(
        Path("configs/deepspeed/zero1.json"),
        description="the DeepSpeed configuration; zero1 sends gradients once a step, zero2 and zero3 once a micro-batch",
    )
    precision: Precision = result("auto", description="auto: bf16 autocast where the processor has it; parameters stay fp32")
    num_ranks: int | None = speed(None, ge=1, description="ranks that pipeline.py starts on a node; null: its GPUs, else 2")
    timeout: float = speed(300.0, gt=0, description="seconds after which a collective that waits for another rank fails")
    activation_checkpointing: bool = speed(False, description="compute a layer's activations again in backward: less memory")
    max_skipped: int = speed(5, gt=0, description="steps in a row with a gradient that is not finite, before training stops")
