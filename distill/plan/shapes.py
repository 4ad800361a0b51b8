"""The teacher and the tasks of the stages on fake tensors: the real modules, which take no memory and compute nothing.

What a forward pass does and leaves behind grows with the length w of a sentence as  a w + s w^2  (s: attention), once c for
all of a micro-batch (matrices cast to bf16). Three passes of different shapes give c, a and s, of any family of encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distill.config import ContrastConfig, HpdConfig, RunConfig, StudentConfig, TrainConfig
from distill.plan.encoders import Architecture
from distill.student import Student
from distill.student.encoder import keep_layers, set_dropout
from distill.training.ckd import Temperature
from distill.training.clock import passes
from distill.training.projection import build_projection

Chunks = Sequence[tuple[int, float]]  # (sentences, tokens that each is padded to)
PROBES = ((8, 16), (8, 32), (16, 16))


@dataclass(frozen=True)
class Growth:
    """constant + sum over chunks of b (linear w + square w^2)."""

    constant: float
    linear: float
    square: float

    def __call__(self, chunks: Chunks) -> float:
        return self.constant + sum(b * (self.linear * w + self.square * w * w) for b, w in chunks)

    @classmethod
    def through(cls, values: Sequence[float]) -> Growth:
        """The growth that takes these values at PROBES: 8 x 16, 8 x 32 and 16 x 16 tokens."""
        first, longer, more = values
        row = (more - first) / 8
        longer_row = row + (longer - first) / 8
        square = (longer_row - 2 * row) / (32**2 - 2 * 16**2)
        return cls(first - 8 * row, (row - square * 16**2) / 16, square)


NOTHING = Growth(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Parameter:
    """is_used: it gets a gradient. group: 0 matrices, 1 vectors, 2 the temperature, as the optimizer has them."""

    numel: int
    is_trained: bool
    is_used: bool
    group: int


@dataclass(frozen=True)
class TaskShape:
    """What a stage trains. flops: of a forward pass in a step; once: of that of a frozen encoder, which reads each sentence
    before the first step, and of which nothing is in flops and activations then (a head takes next to none); activations:
    bytes that the pass leaves for the backward pass; layer: of these what one layer has, where they are computed again. width:
    of its vectors; once_width: of those that the frozen encoder leaves, 0 without one; key_width: of keys; teacher_width: of
    the teacher's vectors; views: sentences of a row that are held against each other; encoded: those and what is replayed;
    layers: of the encoder that a step passes; passes: forward passes that a step's arithmetic is worth."""

    parameters: tuple[Parameter, ...]
    flops: Growth
    once: Growth
    activations: Growth
    layer: Growth
    width: int
    once_width: int
    key_width: int
    teacher_width: int
    views: int
    encoded: int
    layers: int
    passes: int

    def numel(self, *, trained: bool = False, used: bool = False) -> int:
        wanted = (p for p in self.parameters if (p.is_trained or not trained) and (p.is_used or not used))
        return sum(parameter.numel for parameter in wanted)


@dataclass(frozen=True)
class TeacherShape:
    """numel: parameters; bytes: of its weights where they run; flops: of a forward pass."""

    numel: int
    bytes: float
    flops: Growth


def teacher_shape(architecture: Architecture, *, is_bf16: bool) -> TeacherShape:
    """Weights stored in 16 bits stay so in bf16; of others, the matrices of linear layers alone become bf16."""
    with FakeTensorMode():
        encoder = architecture.build().eval()
        encoder.set_attn_implementation("eager")  # whose operations torch counts
        numel = sum(p.numel() for p in encoder.parameters())
        linear = sum(p.numel() for m in encoder.modules() if isinstance(m, nn.Linear) for p in m.parameters())
        values = []
        for rows, width in PROBES:
            tokens = torch.zeros((rows, width), dtype=torch.int64)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            values.append(float(counter.get_total_flops()))
    in_16_bit = 0 if not is_bf16 else numel if architecture.is_16_bit else linear
    return TeacherShape(numel, 4.0 * numel - 2.0 * in_16_bit, Growth.through(values))


def task_shape(
    config: RunConfig, name: str, architecture: Architecture, teacher_dim: int, *, is_bf16: bool, on_cpu: bool
) -> TaskShape:
    """The module of stage `name`, as `training.stage.build_recipe` makes it."""
    train: TrainConfig = getattr(config, name)
    with FakeTensorMode():
        student = _student(config.student, architecture)
        compact_dim, has_projection = _begins_with(config, name, student.width, teacher_dim)
        if isinstance(train, HpdConfig) or compact_dim is not None:
            student.add_head(config.hpd.dim, config.hpd.head, 0)
        dropout = train.dropout if isinstance(train, ContrastConfig) else 0.0
        if dropout is not None:
            set_dropout(student.encoder, dropout)
        task = nn.ModuleDict({"student": student})
        key_width = train.dim if isinstance(train, HpdConfig) else teacher_dim
        if name == "ckd" and (projection := build_projection(student.width, teacher_dim, config.ckd)) is not None:
            task["projection"] = projection
        elif isinstance(train, ContrastConfig) and train.teacher_weight and has_projection:
            task["projection"] = nn.Linear(student.width, teacher_dim)  # trained, whatever it was in ckd
        task["temperature"] = Temperature(train.temperature)  # type: ignore[attr-defined]
        student.encoder.get_input_embeddings().requires_grad_(not config.student.freeze_embeddings)
        is_frozen = isinstance(train, HpdConfig) and train.freeze_encoder
        if is_frozen:
            student.encoder.requires_grad_(False)
        student.encoder.set_attn_implementation("eager")  # whose operations torch counts
        flops, activations = _passes(student, is_bf16)
        if not on_cpu and getattr(student.encoder, "_supports_sdpa", False):
            student.encoder.set_attn_implementation("sdpa")
            activations = _passes(student, is_bf16)[1]
        used = _used(student)
        parameters = tuple(_parameter(n, p, used) for n, p in task.named_parameters())
    views = {"finetune": 3, "simcse": 2}.get(name, 1)
    encoded = views + (isinstance(train, ContrastConfig) and train.teacher_weight > 0)
    worth = passes(student.encoder)
    layers = len(config.student.kept(_depth(architecture)))
    layer = Growth(0.0, activations.linear / layers, activations.square / layers)
    if config.engine.activation_checkpointing and worth > 1:
        activations = Growth(activations.constant, layers * architecture.hidden_size * 4.0, 0.0)
    once, once_width = NOTHING, 0
    if is_frozen:
        flops, once, once_width, activations, layer, layers = NOTHING, flops, student.width, NOTHING, NOTHING, 0
    return TaskShape(
        parameters, flops, once, activations, layer, student.dim, once_width, key_width, teacher_dim, views, encoded, layers,
        worth,
    )  # fmt: skip


def _begins_with(config: RunConfig, name: str, width: int, teacher_dim: int) -> tuple[int | None, bool]:
    """Of the student that stage `name` begins with: the size of its head, and whether ckd's projection lies beside it."""
    init = "student" if name == "ckd" else getattr(config, name).init
    if init == "student":
        return None, False
    if init == "hpd":
        return config.hpd.dim, False
    if init == "ckd":
        return None, build_projection(width, teacher_dim, config.ckd) is not None
    compact_dim, has_projection = _begins_with(config, init, width, teacher_dim)
    return compact_dim, has_projection and getattr(config, init).teacher_weight > 0  # without it, nothing is kept


def _student(config: StudentConfig, architecture: Architecture) -> Student:
    encoder = architecture.build().train()
    if config.layers is not None:
        keep_layers(encoder, config.kept(_depth(architecture)))
    tokenizer: Any = None  # nothing is tokenized
    return Student(encoder, tokenizer, pooling=config.pooling, max_length=config.max_length)


def _depth(architecture: Architecture) -> int:
    return int(getattr(architecture.config, "num_hidden_layers", 0) or architecture.config.num_layers)


def _passes(student: Student, is_bf16: bool) -> tuple[Growth, Growth]:
    """Operations of a forward pass, and the bytes of distinct tensors that it saves beside the parameters."""
    weights = {p.untyped_storage()._cdata for p in student.parameters()}
    flops, saved = [], []
    for rows, width in PROBES:
        tokens = {"input_ids": torch.zeros((rows, width), dtype=torch.int64)}
        tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, Any] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if is_bf16 else nullcontext()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks, autocast:
            student(tokens)
        flops.append(float(counter.get_total_flops()))
        saved.append(float(sum(storage.nbytes() for storage in kept.values())))
    return Growth.through(flops), Growth.through(saved)


def _used(student: Student) -> set[int]:
    """The parameters that a backward pass reaches."""
    tokens = {"input_ids": torch.zeros((2, 8), dtype=torch.int64), "attention_mask": torch.ones((2, 8), dtype=torch.int64)}
    student(tokens).sum().backward()
    return {id(p) for p in student.parameters() if p.grad is not None}


def _parameter(name: str, parameter: nn.Parameter, used: set[int]) -> Parameter:
    group = 2 if name.endswith("logit_scale") else 0 if parameter.ndim >= 2 else 1
    is_used = parameter.requires_grad and (not name.startswith("student.") or id(parameter) in used)
    return Parameter(parameter.numel(), parameter.requires_grad, is_used, group)
