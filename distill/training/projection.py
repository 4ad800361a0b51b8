"""The projection from the student's width to the teacher's, and linear maps fitted before training.

linear       learned; begins as the ridge regression of the teacher's vectors on those of the untrained student
pca          fixed: q = C^T z with C [d_s, d_t] the teacher's first components; the student learns its coordinates
procrustes   fixed: the map with orthonormal columns that brings the untrained student's vectors nearest to the teacher's
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from distill.run.prompts import Role
from distill.run.sampling import first_of_permutation
from distill.run.stopping import CheckStop, never
from distill.shards import ShardReader
from distill.student import Student

FIT_TEXTS = 2048
TEXTS_PER_CHECK = 256  # a multiple of the batch size, so that batches are those of one call
RIDGE = 1e-3

LinearMap = tuple[np.ndarray, np.ndarray]
"""weight [d_out, d_in], bias [d_out]."""
Kind = Literal["auto", "linear", "pca", "procrustes", "none"]


def build_projection(width: int, teacher_dim: int, kind: Kind) -> nn.Linear | None:
    """P: Linear(d_s -> d_t), not fitted yet, or None where none is needed. Raises ValueError if the widths do not fit."""
    if kind == "none" and width != teacher_dim:
        raise ValueError(f"ckd.projection is none, but the student is {width} wide and the teacher {teacher_dim}; use auto")
    if kind == "pca" and width > teacher_dim:
        raise ValueError(f"ckd.projection is pca, but the student is {width} wide and the teacher only {teacher_dim}; use auto")
    if kind == "none" or (kind == "auto" and width == teacher_dim):
        return None
    projection = nn.Linear(width, teacher_dim)
    projection.requires_grad_(kind in ("auto", "linear"))
    return projection


def fit_projection(
    projection: nn.Linear, student: Student, reader: ShardReader, kind: Kind, seed: int, check_stop: CheckStop = never
) -> None:
    """Sets a projection to its initial value, or to its final one where it is not trained."""
    if kind == "pca":
        weight, bias = reader.moments.pca(student.dim)[0].T, np.zeros(reader.dim)
    else:
        sample = fit_sample(reader, seed)
        teacher = sample.vectors
        vectors = encode_sample(student, sample, check_stop, normalize=kind == "procrustes")
        if kind == "procrustes":
            left, _, right = np.linalg.svd(teacher.T @ vectors, full_matrices=False)
            weight, bias = left @ right, np.zeros(reader.dim)
        else:
            weight, bias = ridge_regression(vectors, teacher)
    set_linear(projection, weight, bias)


class Sample(NamedTuple):
    """Texts to fit a map on, their roles, and their teacher vectors, float64 [n, d_t]."""

    texts: list[str]
    roles: list[Role | None]
    vectors: np.ndarray


def fit_sample(reader: ShardReader, seed: int) -> Sample:
    rows = first_of_permutation(len(reader), FIT_TEXTS, seed, 0)
    return Sample(reader.texts(rows), reader.roles(rows), reader.vectors(rows).astype(np.float64))


def encode_sample(student: Student, sample: Sample, check_stop: CheckStop, *, normalize: bool) -> np.ndarray:
    """The student's vectors of the texts, float64 [n, d_s]; every rank calls it with the same texts."""
    texts, roles, _ = sample
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))  # as Student.encode sorts them
    vectors = np.empty((len(texts), student.dim))
    for start in range(0, len(order), TEXTS_PER_CHECK):
        rows = order[start : start + TEXTS_PER_CHECK]
        vectors[rows] = student.encode([texts[i] for i in rows], normalize=normalize, roles=[roles[i] for i in rows])
        check_stop()
    return vectors


def ridge_regression(vectors: np.ndarray, targets: np.ndarray) -> LinearMap:
    """(weight [d_out, d_in], bias [d_out]) of the linear map from vectors [n, d_in] nearest to targets [n, d_out]."""
    design = np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)
    ridge = RIDGE * np.trace(design.T @ design) / design.shape[1]
    solution = np.linalg.solve(design.T @ design + ridge * np.eye(design.shape[1]), design.T @ targets)
    return solution[:-1].T, solution[-1]


@torch.no_grad()
def set_linear(linear: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    linear.bias.copy_(torch.from_numpy(bias))
