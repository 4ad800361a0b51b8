"""A student as a sentence-transformers folder: SentenceTransformer(path).encode gives the student's vectors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer, WeightedLayerPooling
from torch import nn

from distill.files import flush
from distill.student import Student
from distill.student.pooling import NEEDS_HIDDEN_STATES

LOWEST_COSINE = 0.9999


def export_student(student_dir: Path, out: Path, *, card: str, check_on: Sequence[str]) -> None:
    """Writes the student in `student_dir` to the folder `out`, whole or not at all, with `card` as its README.md.

    Before it appears it is loaded again, and its vectors of `check_on` must agree with the student's to cosine 0.9999 at the
    worst. Raises ValueError if they do not.
    """
    student = Student.load(student_dir).eval()
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        model = SentenceTransformer(modules=_modules(student, student_dir), device="cpu", similarity_fn_name="cosine")
        model.save(str(part), create_model_card=False)
        (part / "README.md").write_text(card, encoding="utf-8")
        exported = SentenceTransformer(str(part), device="cpu", trust_remote_code=False)
        worst = float((exported.encode(list(check_on), show_progress_bar=False) * student.encode(check_on)).sum(axis=1).min())
        if not worst >= LOWEST_COSINE:
            raise ValueError(f"the export of {student_dir} does not agree with the student: worst cosine {worst:.5f}")
        for path in part.rglob("*"):
            flush(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    flush(out.parent)


def _modules(student: Student, student_dir: Path) -> list[nn.Module]:
    hidden = student.pooling in NEEDS_HIDDEN_STATES
    transformer = Transformer(
        str(student_dir),
        max_seq_length=student.max_length,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        config_kwargs={"output_hidden_states": True} if hidden else {},
    )
    modules: list[nn.Module] = [transformer]
    if hidden:
        depth = student.encoder.config.num_hidden_layers
        weights = layer_weights(student.pooling, depth)
        modules.append(
            WeightedLayerPooling(student.width, num_hidden_layers=depth, layer_start=1, layer_weights=nn.Parameter(weights))
        )
    token_pooling = "cls" if student.pooling in ("cls", "pooler") else "mean"
    modules.append(Pooling(student.width, pooling_mode=token_pooling))
    if student.pooling == "pooler":
        pooler = student.encoder.get_submodule("pooler.dense")
        assert isinstance(pooler, nn.Linear)
        modules.append(_dense(pooler, nn.Tanh()))
    if student.head is not None:
        linear = student.head[0]
        assert isinstance(linear, nn.Linear)
        modules.append(_dense(linear, nn.Tanh() if len(student.head) > 1 else nn.Identity()))
    return [*modules, Normalize()]


def _dense(linear: nn.Linear, activation: nn.Module) -> Dense:
    return Dense(
        linear.in_features,
        linear.out_features,
        activation_function=activation,
        init_weight=linear.weight,
        init_bias=linear.bias,
    )


def layer_weights(pooling: str, depth: int) -> torch.Tensor:
    """What share each of `depth` layers has in last4_mean or first_last_mean, [depth]."""
    chosen = range(max(0, depth - 4), depth) if pooling == "last4_mean" else {0, depth - 1}
    weights = torch.zeros(depth)
    weights[list(chosen)] = 1.0
    return weights
