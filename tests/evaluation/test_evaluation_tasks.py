import gzip

import numpy as np
import pytest
import torch
from distributed_ranks import on_ranks
from retrieval_sets import write_folder

from distill.evaluation import Encoded, read_tasks
from distill.evaluation.over_ranks import encode_over_ranks
from distill.training.distributed import rank


def encode(sentences: list[str]) -> np.ndarray:
    return np.array([[len(text), *(text.count(letter) for letter in "abcdefg")] for text in sentences], dtype=np.float32)


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


def test_every_text_is_encoded_once_and_measured_as_if_it_were_encoded_on_the_spot(places):
    tasks = read_tasks(**places)
    sentences = tasks.sentences
    assert len(set(sentences)) == len(sentences)
    calls = []

    def counted(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        return encode(texts)

    encoded = Encoded(sentences, counted(sentences))
    results = tasks.measure(encoded)
    assert calls == [len(sentences)]
    assert results == tasks.measure(encode)
    assert set(results) == {
        *("sts", "sts_ci", "sts_resamples", "sts_warnings"),
        *(f"{task}{part}" for task in ("retrieval", "transfer") for part in ("", "_ci", "_resamples")),
    }


def test_a_truncated_encoding_is_that_of_the_first_dimensions(places):
    tasks = read_tasks(**places)
    encoded = Encoded(tasks.sentences, encode(tasks.sentences))
    assert tasks.measure(encoded.truncated(3)) == tasks.measure(lambda texts: encode(texts)[:, :3])
    assert tasks.measure(encoded.truncated(3)) != tasks.measure(encoded)


def test_two_sets_of_one_name_are_refused(places, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_folder(other / "found", "1\t2\t2\n")
    with pytest.raises(ValueError, match="two sets are called found"):
        read_tasks(retrieval=[*places["retrieval"], str(other / "found")])


def _encoded_on_this_rank(sentences: list[str], block: int) -> list | None:
    from distill.evaluation import over_ranks

    over_ranks.SENTENCES_A_BLOCK = block
    seen = []

    def encode_and_count(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return encode(texts).reshape(-1, 8)

    vectors = encode_over_ranks(encode_and_count, sentences if rank() == 0 else [], torch.device("cpu"))
    return [seen, None if vectors is None else vectors.tolist()]


@pytest.mark.parametrize(("num_sentences", "block"), [(11, 100), (11, 4), (1, 4), (8, 4)])
def test_ranks_share_the_sentences_and_rank_0_alone_has_all_vectors_in_order(num_sentences, block):
    sentences = [f"{'abcdefg'[i % 7] * (i + 1)} {i}" for i in range(num_sentences)]
    answers = on_ranks(3, _encoded_on_this_rank, sentences, block)
    assert answers[0][1] == encode(sentences).tolist()
    assert answers[1][1] is None and answers[2][1] is None
    assert sorted(text for seen, _ in answers for text in seen) == sorted(sentences)
