import json

import numpy as np
import pytest

from distill.evaluation.neighbours import neighbours


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


TEXTS = [f"text {number}" for number in range(60)]


def nearest(vectors, row, count):
    """By the plain definition."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit[row]
    cosines[row] = -2
    return sorted(range(len(vectors)), key=lambda other: -cosines[other])[:count], cosines


def lost(teacher, student, row):
    """How much nearer, to the teacher, its own neighbours are than the student's."""
    own, cosines = nearest(teacher, row, 10)
    return cosines[own].mean() - cosines[nearest(student, row, 10)[0]].mean()


def test_the_same_vectors_agree_on_every_neighbour(vectors):
    found = neighbours(TEXTS, 3 * vectors, vectors)
    assert found["shared"] == [0] * 10 + [60] and found["texts"] == 60 and found["nearest"] == 10
    for example in found["agree"] + found["differ"]:
        assert example["shared"] == 10 and example["teacher"] == example["student"]
        assert all(near["both"] and near["teacher"] == near["student"] for near in example["teacher"])


def test_examples_are_the_nearest_by_the_plain_definition_and_the_extremes(vectors):
    student = vectors + np.random.default_rng(1).normal(size=vectors.shape)
    found = neighbours(TEXTS, student, vectors)
    shared = [len({*nearest(student, row, 10)[0]} & {*nearest(vectors, row, 10)[0]}) for row in range(60)]
    assert found["shared"] == np.bincount(shared, minlength=11).tolist()
    order = sorted(range(60), key=lambda row: (-shared[row], lost(vectors, student, row)))
    assert [example["query"] for example in found["agree"]] == [TEXTS[row] for row in order[:5]]
    assert [example["query"] for example in found["differ"]] == [TEXTS[row] for row in order[:-6:-1]]
    for example in found["agree"] + found["differ"]:
        row = TEXTS.index(example["query"])
        assert example["shared"] == shared[row]
        for side, of in (("teacher", vectors), ("student", student)):
            rows, _ = nearest(of, row, 3)
            assert [near["text"] for near in example[side]] == [TEXTS[other] for other in rows]
            for near, other in zip(example[side], rows, strict=True):
                assert near["teacher"] == pytest.approx(nearest(vectors, row, 3)[1][other], abs=1e-4)
                assert near["student"] == pytest.approx(nearest(student, row, 3)[1][other], abs=1e-4)
    assert json.loads(json.dumps(found)) == found


def test_few_texts_give_few_examples(vectors):
    found = neighbours(TEXTS[:3], vectors[:3], vectors[:3])
    assert found["nearest"] == 2 and len(found["agree"]) == len(found["differ"]) == 1
