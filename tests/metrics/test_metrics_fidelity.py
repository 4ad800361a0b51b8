import time

import numpy as np
import pytest
from reference_times import cpu_seconds_to_sort
from scipy.stats import spearmanr

from distill.metrics.fidelity import fidelity


def vectors(num_texts: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_texts, width)).astype(np.float32)


def slow_fidelity(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    def cosine(rows, i, j):
        return float(rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]))

    n = len(student)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    tops, overlaps = [], []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        by_teacher = sorted(others, key=lambda j: -cosine(teacher, i, j))
        by_student = sorted(others, key=lambda j: -cosine(student, i, j))
        near = by_teacher[:50]
        tops.append(spearmanr([cosine(student, i, j) for j in near], [cosine(teacher, i, j) for j in near]).statistic)
        overlaps.append(len(set(by_teacher[:10]) & set(by_student[:10])) / min(10, n - 1))
    of_pairs = [[cosine(rows, i, j) for i, j in pairs] for rows in (student, teacher)]
    return {"spearman": spearmanr(*of_pairs).statistic, "spearman_top50": np.mean(tops), "top10": np.mean(overlaps)}


@pytest.mark.parametrize("num_texts", [7, 30, 70])
def test_fidelity_is_that_of_the_obvious_loops(num_texts):
    teacher = vectors(num_texts, 24).astype(np.float64)
    student = teacher[:, :16] + 0.5 * vectors(num_texts, 16, seed=1)
    assert fidelity(student, teacher) == pytest.approx(slow_fidelity(student, teacher), abs=1e-9)


def test_a_teacher_is_wholly_faithful_to_itself_and_to_its_rotation():
    teacher = vectors(300, 32)
    rotation, _ = np.linalg.qr(vectors(32, 32, seed=1).astype(np.float64))
    assert fidelity(teacher, teacher) == pytest.approx({"spearman": 1, "spearman_top50": 1, "top10": 1})
    assert fidelity(7 * teacher @ rotation, teacher) == pytest.approx({"spearman": 1, "spearman_top50": 1, "top10": 1})


def test_a_rotation_of_the_student_changes_nothing():
    student, teacher = vectors(200, 16), vectors(200, 32)
    student += teacher[:, :16]
    rotation, _ = np.linalg.qr(vectors(16, 16, seed=1).astype(np.float64))
    assert fidelity(student @ rotation, teacher) == pytest.approx(fidelity(student, teacher), abs=1e-6)


def test_an_unrelated_student_has_no_fidelity():
    scores = fidelity(vectors(500, 32), vectors(500, 32, seed=1))
    assert abs(scores["spearman"]) < 0.02
    assert abs(scores["spearman_top50"]) < 0.05
    assert scores["top10"] == pytest.approx(10 / 499, abs=0.02)


def test_a_collapsed_student_scores_zero_and_not_nan():
    scores = fidelity(np.ones((100, 8)), vectors(100, 8))
    assert scores["spearman"] == scores["spearman_top50"] == 0


def test_fidelity_takes_the_fp16_of_shards():
    teacher = vectors(200, 32)
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    assert min(fidelity(teacher, teacher.astype(np.float16)).values()) > 0.99


def test_fidelity_of_2000_texts_costs_about_what_ranking_their_pairs_costs():
    student, teacher = vectors(2000, 128), vectors(2000, 384)
    reference = cpu_seconds_to_sort(2000 * 2000)
    started = time.process_time()
    fidelity(student, teacher)
    assert time.process_time() - started < 10 * reference


@pytest.mark.parametrize(("student", "message"), [((4, 2), "same texts"), ((2, 2), "same texts")])
def test_vectors_of_other_texts_are_refused(student, message):
    with pytest.raises(ValueError, match=message):
        fidelity(np.ones(student), np.ones((3, 2)))


def test_a_vector_that_is_not_finite_is_refused():
    broken = vectors(5, 4)
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        fidelity(broken, vectors(5, 4))
