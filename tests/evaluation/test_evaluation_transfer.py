import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from distill.corpus.evaluation_sets import Labelled, read_transfer
from distill.evaluation import transfer
from distill.evaluation.model_encoder import encoder_of
from distill.evaluation.tasks import read_tasks
from distill.evaluation.transfer import STRENGTHS, transfer_scores
from distill.metrics.vectors import unit

Row = tuple[str, str]


def encode(texts: list[str]) -> np.ndarray:
    """Counts of letters, and noise that is the same for the same text."""
    noise = [np.random.default_rng(list(text.encode())).standard_normal(26) for text in texts]
    counts = [[text.count(chr(code)) for code in range(ord("a"), ord("z") + 1)] for text in texts]
    return (np.array(counts) + 0.1 * np.array(noise)).astype(np.float32)


def rows(count: int, seed: int = 0) -> list[Row]:
    """Texts of nine letters, among them many a (label "vowel") or many b (label "consonant")."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["vowel", "consonant"], size=count)
    return [(label, ("aaaa" if label == "vowel" else "bbbb") + "".join(rng.choice(list("cdefgh"), 5))) for label in labels]


def shuffled(given: list[Row], seed: int = 0) -> list[Row]:
    labels = np.random.default_rng(seed).permutation([label for label, _ in given])
    return [(str(label), text) for label, (_, text) in zip(labels, given, strict=True)]


def write(path: Path, given: list[Row], header: str = "label\ttext") -> None:
    text = "\n".join([header, *("\t".join(row) for row in given)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def scores(folder: Path, **options: int) -> tuple[dict, tuple[float, float]]:
    results = transfer_scores(encode, {"made": read_transfer(folder)}, **options)
    return results["transfer"]["made"], results["transfer_ci"]["made"]["accuracy"]


@pytest.mark.parametrize("parts", [("train.tsv",), ("train.tsv.gz", "test.tsv"), ("train.tsv", "dev.tsv.gz", "test.tsv.gz")])
def test_what_is_separable_is_separated(tmp_path, parts):
    for number, name in enumerate(parts):
        write(tmp_path / name, rows(300, seed=number))
    found, (low, high) = scores(tmp_path)
    assert found["accuracy"] > 0.95
    assert low <= found["accuracy"] <= high
    assert (found["labels"], found["train"], found["test"]) == (2, 300, 300)


@pytest.mark.parametrize("parts", [("train.tsv",), ("train.tsv", "test.tsv")])
def test_labels_without_meaning_are_predicted_by_chance(tmp_path, parts):
    for number, name in enumerate(parts):
        write(tmp_path / name, shuffled(rows(400, seed=number), seed=number))
    found, (low, high) = scores(tmp_path)
    assert abs(found["accuracy"] - 0.5) < 0.1
    assert low < 0.55 and high > 0.45
    assert 0.5 <= found["majority"] < 0.6


def test_no_row_is_predicted_by_a_regression_that_was_fitted_on_it(tmp_path):
    """A regression that was fitted on them would predict every row of random vectors correctly."""
    write(tmp_path / "train.tsv", shuffled([("x" if i % 2 else "y", f"text {i}") for i in range(200)]))
    found, _ = scores(tmp_path)
    assert found["accuracy"] < 0.65


def test_the_strength_is_chosen_on_dev_and_not_on_test(tmp_path):
    write(tmp_path / "train.tsv", rows(200))
    write(tmp_path / "dev.tsv", rows(100, seed=1))
    write(tmp_path / "test.tsv", rows(100, seed=2))
    before, _ = scores(tmp_path)
    write(tmp_path / "test.tsv", shuffled(rows(100, seed=2)))
    after, _ = scores(tmp_path)
    assert after["C"] == before["C"] and after["accuracy"] < before["accuracy"]


def noisy(count: int, seed: int) -> list[Row]:
    """A third of the labels are wrong."""
    given, other = rows(count, seed), shuffled(rows(count, seed), seed)
    return [*other[: 2 * count // 3], *given[2 * count // 3 :]]


def test_the_accuracy_is_that_of_a_regression_on_train_and_dev_with_the_strength_that_was_best_on_dev(tmp_path):
    for number, name in enumerate(["train", "dev", "test"]):
        write(tmp_path / f"{name}.tsv", noisy(120, seed=number))
    given = read_transfer(tmp_path)
    found, _ = scores(tmp_path)

    def accuracy(fitted: list[Labelled], strength: float, tested: Labelled) -> float:
        texts = [text for part in fitted for text in part.texts]
        labels = [label for part in fitted for label in part.labels]
        model = LogisticRegression(C=strength, max_iter=500).fit(unit(encode(texts)), labels)
        return model.score(unit(encode(tested.texts)), tested.labels)

    on_dev = {strength: accuracy([given.train], strength, given.dev) for strength in STRENGTHS}
    on_test = {strength: accuracy([given.train, given.dev], strength, given.test) for strength in STRENGTHS}
    assert found["C"] == max(on_dev, key=lambda strength: on_dev[strength])
    assert found["accuracy"] == pytest.approx(on_test[found["C"]], abs=0.02)  # it starts elsewhere, and stops elsewhere
    assert found["C"] != STRENGTHS[0] and on_test[found["C"]] != on_test[STRENGTHS[0]]  # else it would not show


@pytest.mark.parametrize("parts", [("train",), ("train", "test"), ("train", "dev", "test")])
def test_no_row_is_ever_trained_on_and_tested_by_the_same_regression(tmp_path, monkeypatch, parts):
    fits = []

    class Recorded(transfer.LogisticRegressionCV):
        def fit(self, x, y):
            ((rows, chosen_on),) = self.cv.split(x)
            fits.append((set(x[rows, 0].tolist()), set(x[chosen_on, 0].tolist())))
            self.seen = set(x[:, 0].tolist())
            return super().fit(x, y)

        def predict(self, x):
            fits.append((self.seen, set(x[:, 0].tolist())))
            return super().predict(x)

    monkeypatch.setattr(transfer, "LogisticRegressionCV", Recorded)
    for number, name in enumerate(parts):
        write(tmp_path / f"{name}.tsv", [(str(row % 2), str(100 * number + row)) for row in range(40)])

    def angles(texts: list[str]) -> np.ndarray:
        """Unit vectors, each with a first dimension of its own."""
        return np.array([[np.cos(int(text) / 200), np.sin(int(text) / 200)] for text in texts], dtype=np.float32)

    transfer_scores(angles, {"made": read_transfer(tmp_path)}, bootstrap=0)
    assert len(fits) == (2 if "test" in parts else 20)
    for trained, tested in fits:
        assert trained and tested and not trained & tested
    assert len(set.union(*(tested for _, tested in fits[1::2]))) == 40  # every row of what is tested, once


def test_figures_repeat(tmp_path):
    write(tmp_path / "train.tsv", shuffled(rows(100)))
    assert scores(tmp_path) == scores(tmp_path)
    assert scores(tmp_path, seed=1) != scores(tmp_path)


def test_a_hub_set_is_what_the_same_folder_is(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub, folder = tmp_path / "hub", tmp_path / "folder"
    for where in (hub, folder):
        where.mkdir()
    for number, (split, ours) in enumerate([("train", "train"), ("validation", "dev"), ("test", "test")]):
        given = rows(30, seed=number)
        write(folder / f"{ours}.tsv", given)
        (hub / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text, "label": label}) for label, text in given))
    assert read_transfer(f"hub:{hub}") == read_transfer(folder)
    with pytest.raises(ValueError, match=r"nowhere/nothing.*without a connection"):
        read_transfer("hub:nowhere/nothing")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no train\.tsv"),
        ({"test.tsv": rows(30)}, r"no train\.tsv"),
        ({"train.tsv": rows(19)}, "19 rows of 2 labels"),
        ({"train.tsv": [("a", f"text {i}") for i in range(30)]}, "30 rows of 1 labels"),
        ({"train.tsv": rows(30), "test.tsv": []}, "test.tsv has no rows"),
        ({"train.tsv": [*rows(30), ("a",)]}, "train.tsv, line 32: 1 columns where the header has 2"),
    ],
)
def test_a_malformed_set_is_refused_by_what_it_lacks(tmp_path, files, message):
    for name, given in files.items():
        write(tmp_path / name, given)
    with pytest.raises(ValueError, match=message):
        read_transfer(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_a_label_that_all_folds_but_one_lack_is_refused_by_set_and_file_when_it_is_read(tmp_path, count):
    """The first fold of seed 0 has the rows of `alone`."""
    alone = next(transfer._folds(40, 0))[1][:count]
    given = [("rare" if row in alone else f"{row % 2}", f"text {row}") for row in range(40)]
    write(tmp_path / "train.tsv.gz", given)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/train\.tsv\.gz: .* all rows of label 'rare' \({count}\) are in one fold"
    ):
        read_tasks(transfer=[str(tmp_path)])
    write(tmp_path / "test.tsv", given)
    assert read_tasks(transfer=[str(tmp_path)]).transfer
    (tmp_path / "test.tsv").rename(tmp_path / "dev.tsv")
    assert read_tasks(transfer=[str(tmp_path)]).transfer


def test_a_file_without_the_columns_is_refused(tmp_path):
    write(tmp_path / "train.tsv", rows(30), header="class\ttext")
    with pytest.raises(ValueError, match="no column 'label'"):
        read_transfer(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_transfer(tmp_path / "nowhere")


def test_minilm_tells_questions_from_what_people_say(tmp_path, data, minilm):
    given = []
    for name in ("questions_wellformed", "sgd_utterances"):
        with gzip.open(data / f"unlabelled/{name}.txt.gz", "rt", encoding="utf-8") as file:
            given += [(name, line.strip().rstrip("?.!").lower()) for _, line in zip(range(150), file, strict=False)]
    order = np.random.default_rng(0).permutation(len(given))
    write(tmp_path / "train.tsv.gz", [given[row] for row in order])
    results = transfer_scores(encoder_of(minilm, device="cpu"), {"kind": read_transfer(tmp_path)})
    assert results["transfer"]["kind"]["accuracy"] > 0.9
