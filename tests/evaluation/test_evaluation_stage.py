from types import SimpleNamespace

import numpy as np
import pytest
from retrieval_sets import write_folder

from distill.evaluation import read_tasks, stage


class Letters:
    """Counts of letters, as an encoder of seven dimensions."""

    dim, params = 7, 70

    def __call__(self, sentences: list[str]) -> np.ndarray:
        return np.array([[text.count(letter) + 0.1 for letter in "abcdefg"] for text in sentences], dtype=np.float32)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "throughput", lambda encoder, sentences: 100.0)
    tasks = read_tasks(retrieval=[str(write_folder(tmp_path / "found", "1\t2\t2\n1\t1\t1\n2\t1\t1\n"))])
    config = SimpleNamespace(hpd=SimpleNamespace(nested=[3]))
    return lambda name: stage._measure(config, name, Letters(), None, tasks, [])


def test_nested_sizes_are_measured_on_prefixes_of_the_same_vectors(measure):
    rows = measure("hpd")
    assert list(rows) == ["hpd", "hpd-3"]
    assert (rows["hpd"]["bytes_per_vector"], rows["hpd-3"]["bytes_per_vector"]) == (28, 12)
    assert set(rows["hpd"]["retrieval"]) == {"found"}
    assert rows["hpd"]["retrieval"] != rows["hpd-3"]["retrieval"]
    assert rows["hpd"]["retrieval_resamples"]["found"]["of"] == rows["hpd-3"]["retrieval_resamples"]["found"]["of"]


def test_only_hpd_has_nested_sizes(measure):
    assert list(measure("ckd")) == ["ckd"]
