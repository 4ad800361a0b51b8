"""The way from the student's width to the teacher's, and linear maps fitted before training.

linear       learned; begins as the ridge regression of the teacher's vectors on those of the untrained student
pca          fixed: q = C^T z with C [d_s, d_t] the teacher's first components; the student learns its coordinates
procrustes   fixed: the map with orthonormal columns that brings the untrained student's vectors nearest to the teacher's
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from distill.config import CkdConfig
from distill.sampling import permutation
from distill.shards import ShardReader
from distill.student import Student

FIT_SENTENCES = 2048
RIDGE = 1e-3


def build_projection(width: int, teacher_dim: int, config: CkdConfig) -> nn.Linear | None:
    """P: Linear(d_s -> d_t), not fitted yet, or None where there is none. Raises ValueError if widths and config do not fit."""
    if config.projection_width not in (None, teacher_dim):
        raise ValueError(
            f"ckd.projection_width {config.projection_width} is not the teacher's width {teacher_dim}: leave it out"
        )
    if config.projection == "none" and width != teacher_dim:
        raise ValueError(f"ckd.projection is none, but the student is {width} wide and the teacher {teacher_dim}; use auto")
    if config.projection == "pca" and width > teacher_dim:
        raise ValueError(f"ckd.projection is pca, but the student is {width} wide and the teacher only {teacher_dim}; use auto")
    if config.projection == "none" or (config.projection == "auto" and width == teacher_dim):
        return None
    projection = nn.Linear(width, teacher_dim)
    projection.requires_grad_(config.projection in ("auto", "linear"))
    return projection


def fit_projection(projection: nn.Linear, student: Student, reader: ShardReader, config: CkdConfig, seed: int) -> None:
    """Sets a projection to where it begins, or to what it stays."""
    if config.projection == "pca":
        weight, bias = reader.moments.pca(student.dim)[0].T, np.zeros(reader.dim)
    else:
        sentences, teacher = fit_sample(reader, seed)
        vectors = student.encode(sentences, normalize=config.projection == "procrustes").astype(np.float64)
        if config.projection == "procrustes":
            left, _, right = np.linalg.svd(teacher.T @ vectors, full_matrices=False)
            weight, bias = left @ right, np.zeros(reader.dim)
        else:
            weight, bias = ridge_regression(vectors, teacher)
    set_linear(projection, weight, bias)


def fit_sample(reader: ShardReader, seed: int) -> tuple[list[str], np.ndarray]:
    """Sentences to fit a map on, and their teacher vectors, float64 [n, d_t]."""
    rows = permutation(len(reader), seed, 0)[:FIT_SENTENCES]
    return reader.texts(rows), reader.vectors(rows).astype(np.float64)


def ridge_regression(vectors: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight [d_out, d_in], bias [d_out]) of the linear map from vectors [n, d_in] nearest to targets [n, d_out]."""
    design = np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)
    ridge = RIDGE * np.trace(design.T @ design) / design.shape[1]
    solution = np.linalg.solve(design.T @ design + ridge * np.eye(design.shape[1]), design.T @ targets)
    return solution[:-1].T, solution[-1]


@torch.no_grad()
def set_linear(linear: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    linear.bias.copy_(torch.from_numpy(bias))
