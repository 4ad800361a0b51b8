"""Students for exports: of any encoder, with every pooling and head, saved as training saves them."""

from __future__ import annotations

import numpy as np
from conftest import sentences
from encoders import encoder_and_tokenizer

from distill.export.folder import export_student
from distill.student import Student
from distill.student.student_config import StudentConfig

MAX_LENGTH = 30
TEXTS = [*sentences(20), "key.", "the model reads a tensor from a queue of keys and writes it to a shard " * 4]
"""One of them is longer than MAX_LENGTH."""


def make_student(folder, encoder, *, pooling="mean", head=None, max_length=MAX_LENGTH, layers=None, dim=8):
    config = StudentConfig(init=str(encoder), pooling=pooling, layers=layers)
    student = Student(*encoder_and_tokenizer(config, None, 0), pooling=pooling, max_length=max_length).eval()
    if head:
        student.add_head(dim, head, seed=0)
    student.save(folder, dict(student.named_parameters()) | dict(student.named_buffers()))
    return student


def export(student_dir, out, *formats, texts=TEXTS, card=lambda folder: "# card\n"):
    return export_student(student_dir, out, card=card, check_on=texts, formats=formats)


def cosines(first, second):
    """[n] in float64, of vectors of any length."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    return (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
