"""The student as training begins: a model's encoder, whole or some of its layers, with the settings of the model's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import normalizers

from distill.run.hub import model_snapshot
from distill.run.model_folders import check_model_folder, check_one_route, resolve_model
from distill.student.encoder import NO_LIMIT, build_encoder, is_same_of_embeddings
from distill.student.settings import ModelSettings, read_settings
from distill.student.student import PAD_TO, Student
from distill.student.student_config import StudentConfig


def build_student(config: StudentConfig, teacher: str | None, seed: int) -> Student:
    """The student that `config` describes, in float32; new weights depend on `seed` alone. teacher: the name of the model that
    `student.init: teacher` means.

    Raises ValueError if the model does not exist, is none that a student can begin with, or does not fit the config.
    """
    folder = initial_folder(config, teacher)
    encoder, tokenizer = build_encoder(config, folder, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = initial_settings(config, folder, has_weights=not config.from_scratch)
    if settings.lowercases:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [backend.normalizer])])
    pooling, max_length = pooling_and_length(config, settings, tokenizer.model_max_length)
    student = Student(encoder, tokenizer, pooling=pooling, max_length=max_length, settings=settings)
    check_truncation(config, student)
    encoder.eval()
    student.embeds_tokens_first = is_same_of_embeddings(encoder)
    _check_padding_is_ignored(student)
    return student


@torch.no_grad()
def _check_padding_is_ignored(student: Student) -> None:
    """Raises ValueError for an encoder that mixes padding into a text's vector."""
    tokens = student.tokenize(["a short text", "a text"])
    padded = {name: torch.nn.functional.pad(values, (0, PAD_TO)) for name, values in tokens.items()}
    if tokens["input_ids"].shape[1] + PAD_TO > student.max_length:
        return
    alone, beside = student(tokens), student(padded)
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise ValueError(
            f"student.init: the vectors of a {student.encoder.config.model_type} depend on the padding, and so on the texts"
            " beside a text; name another encoder"
        )


def initial_folder(config: StudentConfig, teacher: str | None) -> Path:
    """The folder of the initial model; one from the hub is downloaded. Raises ValueError if there is none."""
    if config.init == "teacher" and teacher is None:
        raise ValueError("student.init is teacher, but the config names no teacher.model; name an encoder in student.init")
    name = resolve_model(teacher if config.init == "teacher" and teacher else config.init)
    folder = Path(name)
    if not folder.is_dir():
        folder = model_snapshot(name, config.revision)
        check_model_folder(folder)
    check_one_route(folder)
    return folder


def initial_settings(config: StudentConfig, folder: Path, *, has_weights: bool = True) -> ModelSettings:
    """The settings of the initial model with the config's own. has_weights: as for `read_settings`."""
    return with_config(read_settings(folder, has_weights=has_weights), config)


def with_config(settings: ModelSettings, config: StudentConfig) -> ModelSettings:
    """The settings, but for the prompts and the truncation that the config replaces."""
    if config.truncate_dim is not None:
        settings = replace(settings, truncate_dim=config.truncate_dim)
    if config.prompts is not None:
        settings = replace(
            settings, prompts={str(role): text for role, text in config.prompts.items()}, default_prompt_name=None
        )
    return settings


def check_truncation(config: StudentConfig, student: Student) -> None:
    """Raises ValueError for more dimensions than the student has."""
    if config.truncate_dim is not None and config.truncate_dim > student.full_width:
        raise ValueError(
            f"student.truncate_dim {config.truncate_dim} is above the {student.full_width} dimensions of the student; lower it,"
            " or leave it out"
        )


def pooling_and_length(config: StudentConfig, settings: ModelSettings, tokenizer_length: int | None) -> tuple[str, int]:
    """The student's pooling and longest input, from the config, else the model's settings, else mean and its tokenizer's."""
    length = config.max_length or settings.max_length or tokenizer_length
    return config.pooling or settings.pooling or "mean", int(min(length or NO_LIMIT, NO_LIMIT))


def describe_initial(config: StudentConfig, student: Student, folder: Path) -> str:
    """What the student has of its initial model, and what the config replaces, in one line."""
    own = read_settings(folder, has_weights=False)
    parts = [f"pooling {student.pooling}"]
    if config.pooling is not None and own.pooling not in (None, config.pooling):
        parts[0] += f" (student.pooling; the model's own is {own.pooling})"
    elif own.pooling is None and config.pooling is None:
        parts[0] += " (a plain encoder names none; student.pooling does)"
    parts.append(f"at most {student.max_length} tokens")
    if config.max_length is not None and own.max_length not in (None, config.max_length):
        parts[-1] += f" (student.max_length; the model's own is {own.max_length})"
    if shapes := [f"{module.in_features} -> {module.out_features}" for module in student.dense if hasattr(module, "linear")]:
        parts.append(f"Dense {', '.join(shapes)}")
    if student.settings.truncate_dim is not None:
        parts.append(f"the first {student.settings.truncate_dim} dimensions")
    named = [f"{name} {prompt!r}" for name, prompt in student.settings.prompts.items() if prompt]
    if named:
        parts.append(f"prompts {', '.join(named)}" + (" (student.prompts)" if config.prompts is not None else ""))
    return "; ".join(parts)
