"""Parameters, FLOPs and activations of the teacher and of each stage's module, built as fake tensors, which take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distill.config import RunConfig
from distill.plan.architectures import Architecture
from distill.student import Student
from distill.student.encoder import keep_layers, set_dropout
from distill.student.initial import pooling_and_length, with_config
from distill.student.settings import without_weights
from distill.teacher.identity import initial_student
from distill.training.contrast import ContrastConfig
from distill.training.projection import build_projection
from distill.training.step_metrics import num_passes
from distill.training.task import Temperature
from distill.training.tasks.finetune import FinetuneConfig
from distill.training.tasks.hpd import HpdConfig
from distill.training.teacher_keys import KeysConfig
from distill.training.train_config import TemperatureConfig

Chunks = Sequence[tuple[int, float]]  # (texts, tokens that each is padded to) of each forward pass
PROBES = ((8, 16), (8, 32), (16, 16))


@dataclass(frozen=True)
class Growth:
    """What b texts, padded to w tokens, take: constant + b (linear w + square w^2), fitted to three forward passes.

    The square is that of attention, the constant that of matrices cast to bf16.
    """

    constant: float = 0.0
    linear: float = 0.0
    square: float = 0.0

    def __call__(self, chunks: Chunks) -> float:
        return self.constant + sum(b * (self.linear * w + self.square * w * w) for b, w in chunks)

    @classmethod
    def fit(cls, values: Sequence[float]) -> Growth:
        """The growth that has these values at PROBES."""
        first, longer, more = values
        text = (more - first) / 8
        square = (text + (longer - first) / 8 - 2 * text) / (32**2 - 2 * 16**2)
        return cls(first - 8 * text, (text - square * 16**2) / 16, square)


class Parameter(NamedTuple):
    """A parameter tensor. group: 0 matrices, 1 vectors, 2 the temperature, as in the optimizer."""

    numel: int
    is_trained: bool
    group: int


@dataclass(frozen=True, kw_only=True)
class TaskShape:
    """The module that a stage trains, and what its loss compares.

    train: the stage's config section.
    forward_flops: FLOPs of the student's forward pass.
    activations: bytes that the forward pass of a step keeps for the backward pass.
    flops_factor: FLOPs of a step / FLOPs of its forward passes; 0 for a frozen encoder, which encodes every text once before.
    num_layers: encoder layers that a step runs through.
    num_views: texts of a row that are contrasted with each other.
    texts_per_row: these and, where the teacher has a weight, one that is compared with its own teacher vector alone.
    query_sets: query matrices that are compared with all keys: 1 for ckd (student), 2 for congen (student and teacher).
    num_terms: terms of the loss.
    """

    train: Any
    parameters: tuple[Parameter, ...]
    forward_flops: Growth
    activations: Growth
    flops_factor: int
    num_layers: int
    student_dim: int
    encoder_dim: int
    teacher_dim: int
    key_dim: int
    num_views: int
    texts_per_row: int
    query_sets: int
    num_terms: int

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if parameter.is_trained)


class TeacherShape(NamedTuple):
    num_parameters: int
    weight_bytes: float
    forward_flops: Growth


def teacher_shape(architecture: Architecture, *, is_bf16: bool) -> TeacherShape:
    """The shape of one encoder. Weights stored in 16 bits stay so in bf16; of others, only linear layers become bf16."""
    with FakeTensorMode(), torch.no_grad():
        encoder = architecture.build().eval().requires_grad_(False)  # as a teacher is; FlopCounterMode tracks what is trained
        encoder.set_attn_implementation("eager")  # whose FLOPs torch counts
        linear = sum(p.numel() for m in encoder.modules() if isinstance(m, nn.Linear) for p in m.parameters())
        flops, _ = _probe(encoder, lambda tokens: encoder(**tokens), is_bf16=False)
    numel = encoder.num_parameters()
    num_16_bit = 0 if not is_bf16 else numel if architecture.is_16_bit else linear
    return TeacherShape(numel, 4.0 * numel - 2.0 * num_16_bit, flops)


def task_shape(
    config: RunConfig, name: str, architecture: Architecture, teacher_dim: int, *, is_bf16: bool, on_cpu: bool
) -> TaskShape:
    """The module that stage `name` trains. Fields that its section does not have, as that of an installed package, count as
    absent: no temperature, no weights, one text a row."""
    train: Any = config.train(name)
    with FakeTensorMode():
        task = _build_task(config, name, architecture, teacher_dim)
        student: Any = task["student"]
        student.encoder.set_attn_implementation("eager")
        flops, activations = _probe(student, student, is_bf16)
        if not on_cpu and getattr(student.encoder, "_supports_sdpa", False):
            student.encoder.set_attn_implementation("sdpa")
            _, activations = _probe(student, student, is_bf16)
    groups = ((2 if name.endswith("logit_scale") else int(p.ndim < 2), p) for name, p in task.named_parameters())
    factor, num_layers = num_passes(student.encoder), student.encoder.config.num_hidden_layers
    if getattr(train, "freeze_encoder", False):
        factor, activations, num_layers = 0, Growth(), 0
    elif config.engine.activation_checkpointing and factor > 1:
        factor += 1  # layer inputs are kept, and one layer at a time is computed again
        kept = num_layers * architecture.config.hidden_size * 4  # bytes of a float32
        activations = replace(
            activations, linear=activations.linear / num_layers + kept, square=activations.square / num_layers
        )
    num_views = 3 if isinstance(train, FinetuneConfig) else 2 if isinstance(train, ContrastConfig) else 1
    weights = train.weights if isinstance(train, KeysConfig) else {}
    return TaskShape(
        train=train,
        parameters=tuple(Parameter(p.numel(), p.requires_grad, group) for group, p in groups),
        forward_flops=flops,
        activations=activations,
        flops_factor=factor,
        num_layers=num_layers,
        student_dim=student.dim,
        encoder_dim=student.width,
        teacher_dim=teacher_dim,
        key_dim=train.dim if isinstance(train, HpdConfig) else teacher_dim,
        num_views=num_views,
        texts_per_row=num_views + bool(getattr(train, "teacher_weight", 0)),
        query_sets=bool(weights.get("ckd")) + 2 * bool(weights.get("congen")),
        num_terms=sum(map(bool, weights.values())) if weights else 2,
    )


def stage_chain(config: RunConfig, name: str) -> list[str]:
    """Stage `name`, then the stage that its student is initialised from, and so on back to the first."""
    chain = [name]
    while (init := getattr(config.stage_of(chain[-1]), "init", "student")) != "student":
        chain.append(init)
    return chain


def _build_task(config: RunConfig, name: str, architecture: Architecture, teacher_dim: int) -> nn.ModuleDict:
    """Student, projection and temperature of stage `name`, with new weights."""
    train, section, chain = config.train(name), config.student, stage_chain(config, name)
    if section.vocabulary is not None and section.vocabulary.size is not None:
        architecture = architecture.with_vocabulary(section.vocabulary.size)
    encoder = architecture.build().train()
    if section.layers is not None:
        keep_layers(encoder, section.kept(encoder.config.num_hidden_layers))
    tokenizer: Any = None  # not needed: no text is encoded
    pooling, max_length = pooling_and_length(section, architecture.settings, architecture.max_length)
    settings = without_weights(with_config(architecture.settings, initial_student(section, config.teacher)))
    student = Student(encoder, tokenizer, pooling=pooling, max_length=max_length, settings=settings)
    if "hpd" in chain:
        compact: Any = config.train("hpd")
        student.add_head(compact.dim, compact.head, 0)
    dropout = getattr(train, "dropout", 0.0)
    if dropout is not None:
        set_dropout(encoder, dropout)
    encoder.get_input_embeddings().requires_grad_(not section.freeze_embeddings)
    if getattr(train, "freeze_encoder", False):
        encoder.requires_grad_(False)
        student.dense.requires_grad_(False)
    task = nn.ModuleDict({"student": student})
    if isinstance(temperature := getattr(train, "temperature", None), TemperatureConfig):
        task["temperature"] = Temperature(temperature)
    # ckd's projection is kept by the stages after it while they compare texts with the teacher's vectors
    if chain[-1] == "ckd" and all(getattr(config.train(each), "teacher_weight", 0) for each in chain[:-1]):
        ckd: Any = config.train("ckd")
        projection = build_projection(student.width, teacher_dim, ckd.projection)
        if projection is not None:
            task["projection"] = projection if name == "ckd" else projection.requires_grad_(True)  # there it is always trained
    return task


def _probe(module: nn.Module, forward: Callable[[dict[str, torch.Tensor]], Any], is_bf16: bool) -> tuple[Growth, Growth]:
    """FLOPs of a forward pass, and bytes of the distinct tensors besides the parameters that it saves for backward."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    flops, saved_bytes = [], []
    for rows, width in PROBES:
        saved: dict[int, Any] = {}

        def save(tensor: torch.Tensor, saved: dict[int, Any] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor

        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if is_bf16 else nullcontext()
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks, autocast:
            forward({name: torch.ones((rows, width), dtype=torch.int64) for name in ("input_ids", "attention_mask")})
        flops.append(float(counter.get_total_flops()))
        saved_bytes.append(float(sum(storage.nbytes() for storage in saved.values())))
    return Growth.fit(flops), Growth.fit(saved_bytes)
