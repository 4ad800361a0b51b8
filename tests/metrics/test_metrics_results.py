"""results.json keeps its names, and what is not one of this version is refused by file and key."""

from __future__ import annotations

import json

import pytest

from distill.metrics.results import ModelResults, Resampled, read_results, write_model_results, write_results


@pytest.fixture
def results() -> ModelResults:
    return ModelResults(
        dim=16,
        params=1000,
        bytes_per_vector=64,
        fidelity={"spearman": 0.9, "spearman_top50": 0.8, "top10": 0.7, "texts": 2000},
        sts={"STS12": 72.37, "AVG": 72.37, "AVG_OF": ["STS12"]},
        sts_ci={"STS12": (70.0, 74.0)},
        sts_resamples={"STS AVG": Resampled(score=72.37, sample="0a", values=[72.0, 73.0])},
        retrieval={"scifact": {"ndcg@10": 0.5, "int8": {"ndcg@10": 0.4, "bytes_per_vector": 16}}},
        retrieval_ci={"scifact": {"ndcg@10": (0.4, 0.6), "int8": {"ndcg@10": (0.3, 0.5)}}},
    )


def test_a_run_has_its_version_and_each_model_by_name_under_the_fixed_keys(tmp_path, results):
    path = tmp_path / "results.json"
    write_results(path, {"teacher": results, "hpd-8": results.model_copy(update={"dim": 8})})
    content = json.loads(path.read_text())
    assert set(content) == {"version", "self", "teacher", "hpd-8"} and content["version"] == 1
    assert content["teacher"]["sts"] == {"STS12": 72.37, "AVG": 72.37, "AVG_OF": ["STS12"]}
    assert content["teacher"]["sts_ci"] == {"STS12": [70.0, 74.0]}
    assert content["teacher"]["retrieval"]["scifact"]["int8"]["bytes_per_vector"] == 16
    assert set(content["teacher"]["fidelity"]) == {"spearman", "spearman_top50", "top10", "texts"}
    assert "transfer" not in content["teacher"] and "texts_per_second" not in content["teacher"]
    assert read_results(path)["teacher"] == results and read_results(path)["hpd-8"].dim == 8


def test_one_model_is_called_as_its_file(tmp_path, results):
    write_model_results(tmp_path / "small.json", results)
    assert read_results(tmp_path / "small.json") == {"small": results}
    assert json.loads((tmp_path / "small.json").read_text())["dim"] == 16


def test_values_are_found_by_their_json_keys(results):
    assert results.at("sts", "AVG") == 72.37 and results.at("fidelity", "top10") == 0.7
    assert results.at("retrieval_ci", "scifact", "int8", "ndcg@10") == (0.3, 0.5)
    assert results.at("transfer", "sst2", "accuracy") is None and results.at("sts_quantised", "int8", "AVG") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"teacher": {"dim": 3, "params": 1, "bytes_per_vector": 12}}, r"no results of version 1 \(version: Field required"),
        ({"version": 2}, r"no results of version 1 \(version: "),
        ({"version": 1, "ckd": {"dim": 3}}, r"ckd\.params: Field required"),
        ({"version": 1, "dim": 3, "params": 1, "bytes_per_vector": 12, "bytes": 1}, r"bytes: Extra inputs"),
        ({"dim": 3, "params": 1, "bytes_per_vector": 12}, r"no results of version 1 \(version: "),
        ([], "cannot read the results|no results of version 1"),
    ],
)
def test_other_content_is_refused_by_key(tmp_path, content, message):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot read the results"):
        read_results(path)
