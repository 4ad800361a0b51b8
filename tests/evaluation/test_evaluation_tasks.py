import gzip

import numpy as np
import pytest
import torch
from distributed_ranks import on_ranks
from retrieval_sets import write_folder

from distill.evaluation.model_encoder import encode_over_ranks
from distill.evaluation.tasks import read_tasks
from distill.metrics.vectors import EncodedTexts, encode_by_role
from distill.run.collectives import rank


def encode(texts: list[str], role: str | None = None) -> np.ndarray:
    """Counts of letters; a query has a prompt of two letters, a document one of three."""
    texts = [{"query": "ab", "document": "cde"}.get(role, "") + text for text in texts]
    return np.array([[len(text), *(text.count(letter) for letter in "abcdefg")] for text in texts], dtype=np.float32)


@pytest.fixture
def places(tmp_path) -> dict:
    sts = ["score\tsentence1\tsentence2", *(f"{i % 5}\t{'ab' * i}\t{'bc' * (i % 7)} x" for i in range(1, 20))]
    (tmp_path / "stsb_test.tsv.gz").write_bytes(gzip.compress("\n".join(sts).encode()))
    labelled = ["label\ttext", *(f"{i % 2}\t{'ag'[i % 2] * (i + 1)}" for i in range(40))]
    (tmp_path / "kind").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"kind/{name}.tsv").write_text("\n".join(labelled) + "\n")
    write_folder(tmp_path / "found", "1\t2\t2\n2\t1\t1\n")
    return {"sts": str(tmp_path), "retrieval": [str(tmp_path / "found")], "transfer": [str(tmp_path / "kind")]}


def test_every_text_of_a_side_is_encoded_once_and_measured_as_if_it_were_encoded_on_the_spot(places):
    tasks = read_tasks(**places)
    texts = tasks.texts
    assert len(set(texts)) == len(texts)
    calls = {}

    def counted(texts: list[str], role: str | None) -> np.ndarray:
        assert role not in calls
        calls[role] = len(texts)
        return encode(texts, role)

    encoded = EncodedTexts(texts, encode_by_role(counted, texts))
    results = tasks.measure(encoded)
    assert calls == {role: sum(each == role for each, _ in texts) for role in (None, "query", "document")}
    assert results == tasks.measure(encode)
    assert set(results) == {
        *("sts", "sts_ci", "sts_quantised", "sts_resamples", "sts_warnings"),
        *(f"{task}{part}" for task in ("retrieval", "transfer") for part in ("", "_ci", "_resamples")),
    }


def test_the_fingerprint_changes_with_the_sets_and_the_precisions(places):
    fingerprint = read_tasks(**places).fingerprint
    assert fingerprint == read_tasks(**places).fingerprint
    others = [places | {"transfer": []}, places | {"retrieval": []}, {"sts": places["sts"], "precisions": ["int8"]}]
    assert len({fingerprint, *(read_tasks(**other).fingerprint for other in others)}) == 4
    tasks = read_tasks(**places)
    next(iter(tasks.sts.values())).gold[0] += 1
    assert tasks.fingerprint != fingerprint


def test_two_sets_of_one_name_are_refused(places, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_folder(other / "found", "1\t2\t2\n")
    with pytest.raises(ValueError, match="two sets are called found"):
        read_tasks(retrieval=[*places["retrieval"], str(other / "found")])


def _encoded_on_this_rank(texts: list, block: int) -> list | None:
    from distill.evaluation import model_encoder

    model_encoder.TEXTS_PER_BLOCK = block
    seen = []

    def encode_and_count(some: list[str], role: str | None = None) -> np.ndarray:
        seen.extend([role, text] for text in some)
        return encode(some, role).reshape(-1, 8)

    vectors = encode_over_ranks(encode_and_count, texts if rank() == 0 else [], torch.device("cpu"))
    return [seen, None if vectors is None else vectors.tolist()]


@pytest.mark.parametrize(("num_texts", "block"), [(11, 100), (11, 4), (1, 4), (8, 4)])
def test_ranks_share_the_texts_and_rank_0_alone_has_all_vectors_in_order(num_texts, block):
    texts = [[(None, "query", "document")[i % 3], f"{'abcdefg'[i % 7] * (i + 1)} {i}"] for i in range(num_texts)]
    answers = on_ranks(3, _encoded_on_this_rank, texts, block)
    assert answers[0][1] == [encode([text], role)[0].tolist() for role, text in texts]
    assert answers[1][1] is None and answers[2][1] is None
    assert sorted((text for seen, _ in answers for text in seen), key=str) == sorted(texts, key=str)
