import tracemalloc

import numpy as np
import pytest

from distill.corpus.evaluation_sets import Labelled, RetrievalSet, TransferSet
from distill.evaluation.compare import compare, read_model
from distill.evaluation.retrieval import retrieval_scores
from distill.evaluation.score_tables import format_comparison
from distill.evaluation.transfer import transfer_scores
from distill.metrics.bootstrap import difference, draw_counts, interval, resampled_means, sample_name
from distill.metrics.results import ModelResults, write_model_results, write_results
from distill.metrics.sts import Pairs, sts_scores

DIM = 24


def concept_vector(number: int) -> np.ndarray:
    return np.random.default_rng([7, number]).standard_normal(DIM)


class Noisy:
    """A model of texts "c3 17": the vector of concept 3, and noise of the text's own, the same each time."""

    def __init__(self, noise: float, seed: int = 1) -> None:
        self.noise, self.seed = noise, seed

    def __call__(self, texts: list[str], side: str | None = None) -> np.ndarray:
        vectors = []
        for text in texts:
            concept, number = text.split()
            centre = concept_vector(int(concept[1:]))
            own = np.random.default_rng([int(concept[1:]), int(number), self.seed]).standard_normal(DIM)
            vectors.append(centre + self.noise * own)
        return np.array(vectors, dtype=np.float32)


def retrieval_set(num_queries: int = 60) -> RetrievalSet:
    documents = {f"d{i}-{j}": f"c{i} {j}" for i in range(num_queries) for j in range(4)}
    grades = {f"q{i}": {f"d{i}-{j}": 1 for j in range(4)} for i in range(num_queries)}
    return RetrievalSet(documents, {f"q{i}": f"c{i} 99" for i in range(num_queries)}, grades)


def everything(encode: Noisy, seed: int = 0, bootstrap: int = 400) -> ModelResults:
    concepts = np.random.default_rng(3).integers(0, 40, size=(150, 2))
    first, second = ([f"c{number} {i}" for i, number in enumerate(side)] for side in concepts.T)
    gold = np.array([concept_vector(one) @ concept_vector(other) for one, other in concepts])
    train, test = (
        Labelled([f"c{i % 3} {i}" for i in some], [f"{i % 3}" for i in some]) for some in (range(90), range(90, 250))
    )
    options = {"seed": seed, "bootstrap": bootstrap}
    scores = (
        sts_scores(encode, {"STSB": Pairs(first, second, gold)}, **options)
        | retrieval_scores(encode, {"made": retrieval_set()}, **options)
        | transfer_scores(encode, {"three": TransferSet(train, None, test)}, **options)
    )
    return ModelResults(dim=DIM, params=1, bytes_per_vector=4 * DIM, **scores)


def test_draws_are_resamples_with_replacement_and_a_function_of_what_they_are_of():
    of = sample_name(0, {"a": [1, 2]})
    drawn = np.concatenate(list(draw_counts(of, 50, 2000)))
    assert (drawn.sum(axis=1) == 50).all() and drawn.mean(axis=0) == pytest.approx(np.ones(50), abs=0.15)
    assert drawn.var(axis=0).mean() == pytest.approx(1 - 1 / 50, abs=0.05)  # binomial, as with replacement
    assert (np.concatenate(list(draw_counts(sample_name(0, {"a": [1, 2]}), 50, 2000))) == drawn).all()
    assert sample_name(1, {"a": [1, 2]}) != of != sample_name(0, {"a": [1, 3]})


def test_the_interval_of_a_mean_is_the_normal_one_for_many_items():
    scores = np.random.default_rng(0).uniform(size=400)
    low, high = interval(*resampled_means([scores], sample_name(0, {}), 4000))
    half = 1.96 * scores.std() / 20
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.004)


@pytest.mark.parametrize("num_items", [7, 300, 1379])
@pytest.mark.parametrize("resamples", [0, 1, 100, 1000])
def test_blocks_of_resamples_give_the_bits_of_all_resamples_drawn_at_once(num_items, resamples):
    of, scores = sample_name(0, {}), np.random.default_rng(0).uniform(size=(2, num_items))
    rng = np.random.default_rng(int(of, 16))
    at_once = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=resamples)
    for means, values in zip(resampled_means(list(scores), of, resamples), scores, strict=True):
        assert means.tobytes() == (at_once @ values / num_items).tobytes()


def test_resamples_are_never_held_all_at_once():
    tracemalloc.start()
    resampled_means([np.ones(10_000)], sample_name(0, {}), 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1000 * 10_000 * 8 / 5


def test_a_paired_difference_is_the_difference_of_each_resample():
    rng = np.random.default_rng(0)
    first = rng.uniform(size=300)
    second = first + 0.02 + 0.01 * rng.standard_normal(300)
    of = sample_name(0, {})
    means, other_means, means_of_difference = resampled_means([first, second, second - first], of, 1000)
    paired = difference(means, other_means)
    assert paired == pytest.approx(interval(means_of_difference))
    assert 0 < paired[0] < 0.02 < paired[1]
    unpaired = difference(means, *resampled_means([second], sample_name(1, {}), 1000))
    assert unpaired[0] < 0 < unpaired[1]
    with pytest.raises(ValueError, match="3 and 2 resamples"):
        difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_a_model_is_not_distinguishable_from_itself_and_a_much_worse_one_is():
    good, same, bad = (everything(Noisy(noise)) for noise in (1.0, 1.0, 6.0))
    for row in compare(good, same):
        assert (row.difference, row.interval, row.verdict) == (0, (0, 0), "not distinguishable from 0"), row
    rows = compare(good, bad)
    assert [row.measure for row in rows] == ["STS AVG", "made ndcg@10", "three accuracy"]
    for row in rows:
        low, high = row.interval
        assert low < row.difference < high < 0, row
        assert row.verdict == "first is better"
    assert [row.verdict for row in compare(bad, good)] == ["second is better"] * 3


def test_a_small_difference_of_two_models_alike_is_not_taken_for_a_result():
    rows = compare(everything(Noisy(2.5, seed=1)), everything(Noisy(2.5, seed=2)))
    for row in rows:
        assert row.difference != 0 and row.verdict == "not distinguishable from 0", row


def test_what_was_measured_on_other_resamples_is_not_compared():
    given = everything(Noisy(1.0))
    for other in (everything(Noisy(1.0), seed=1), everything(Noisy(1.0), bootstrap=0), everything(Noisy(1.0), bootstrap=10)):
        for row in compare(given, other):
            assert row.verdict.startswith("not comparable") and row.difference is None
    with pytest.raises(ValueError, match="no measure in common"):
        compare(given, ModelResults(dim=3, params=1, bytes_per_vector=12))


def test_results_are_read_by_file_and_model_and_printed_with_their_names(tmp_path):
    one, run = tmp_path / "one.json", tmp_path / "results.json"
    results = everything(Noisy(1.0))
    write_model_results(one, results)
    write_results(run, {"teacher": results, "ckd": everything(Noisy(6.0))})
    (name, first), (other, second) = read_model(str(one)), read_model(f"{run}:ckd")
    assert (name, other) == ("one", "ckd")
    printed = format_comparison(name, other, compare(first, second, (name, other)))
    assert "one" in printed.splitlines()[0] and "ckd" in printed.splitlines()[0]
    assert "one is better" in printed and "made ndcg@10" in printed
    for where, message in (
        (str(run), "several models"),
        (f"{run}:hpd", "has no model hpd"),
        (str(tmp_path / "no"), "cannot read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(where)
