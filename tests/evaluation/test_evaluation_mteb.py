"""Tasks of mteb: our metrics agree with the library's, and no two models share its results.

Differences that are known: mteb strips queries and documents, looks at the first 1,000 documents of a query, orders those of
equal score by their ids, and rounds retrieval to five decimals. STS is Spearman's correlation as a fraction of 1.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences
from distributed_ranks import on_ranks
from encoders import save_sentence_transformer
from retrieval_sets import write_folder

pytest.importorskip("mteb")
from distill.corpus.evaluation_sets import read_pairs, read_retrieval
from distill.evaluation.model_encoder import ModelEncoder, encoder_of, work_over_ranks
from distill.evaluation.mteb_tasks import MtebModel, MtebTasks, name_and_revision
from distill.evaluation.retrieval import retrieval_scores
from distill.metrics.sts import sts_scores
from distill.metrics.vectors import EncodedTexts, encode_by_role
from distill.run.collectives import rank

PROMPTS = {"query": "the query asks for ", "document": "a key of the queue "}


@pytest.fixture(scope="module")
def model(tiny_encoder, tmp_path_factory) -> str:
    return str(save_sentence_transformer(tiny_encoder, tmp_path_factory.mktemp("prompted") / "model", prompts=PROMPTS))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A retrieval set with grades, and a file of STS pairs."""
    folder = tmp_path_factory.mktemp("sets")
    documents = [(str(number), "title" if number % 2 else "", text) for number, text in enumerate(sentences(100))]
    queries = [(f"q{number}", " ".join(documents[4 * number][2].split()[:4])) for number in range(25)]
    qrels = "".join(f"q{number}\t{4 * number + other}\t{1 + other % 3}\n" for number in range(25) for other in range(4))
    retrieval = write_folder(folder, qrels, documents=documents, queries=queries)
    texts = sentences(120, seed=1)
    pairs = folder / "pairs.tsv"
    rows = [f"{number % 6}\t{texts[2 * number]}\t{texts[2 * number + 1]}" for number in range(60)]
    pairs.write_text("\n".join(["score\tsentence1\tsentence2", *rows]) + "\n", encoding="utf-8")
    return retrieval, pairs


def wrapped(encoder: ModelEncoder, model: str) -> MtebModel:
    return MtebModel(encoder, model, dim=encoder.dim, params=encoder.params, truncate_dim=None, progress=False)


def check_agreement(model: str, retrieval: list[Path], sts: list[Path], folder: Path) -> None:
    encoder = encoder_of(model, device="cpu")
    measured = MtebTasks([*map(str, retrieval), *map(str, sts)]).measure(wrapped(encoder, model), folder)
    for place in retrieval:
        given = {place.name: read_retrieval(place)}
        texts = [("query", text) for text in given[place.name].queries.values()]
        texts = list(dict.fromkeys([*texts, *(("document", text) for text in given[place.name].documents.values())]))
        found = retrieval_scores(EncodedTexts(texts, encode_by_role(encoder, texts)), given, bootstrap=0)
        assert measured[place.name] == pytest.approx(found["retrieval"][place.name]["ndcg@10"], abs=5e-5)
    for place in sts:
        found = sts_scores(encoder, {"STSB": read_pairs(place)}, bootstrap=0)
        assert measured[place.name.split(".")[0]] == pytest.approx(found["sts"]["STSB"] / 100, abs=5e-5)


def test_our_metrics_are_those_of_mteb_to_four_decimals_prompts_and_grades_included(model, places, tmp_path):
    check_agreement(model, [places[0]], [places[1]], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["minilm-l6", "me5-small"])
def test_they_are_for_real_models_and_sets(name, tmp_path):
    models, data = (os.environ.get(variable) for variable in ("DISTILL_MODELS", "DISTILL_DATA"))
    if models is None or data is None:
        pytest.skip("DISTILL_MODELS and DISTILL_DATA are not set")
    retrieval = [Path(data) / "retrieval" / each for each in ("cacm", "npl_vaswani", "cranfield")]
    sts = [Path(data) / "sts" / f"{each}.tsv.gz" for each in ("stsb_test", "sts12_test")]
    check_agreement(str(Path(models) / name), retrieval, sts, tmp_path)


def test_results_are_in_mtebs_format_under_the_digest_of_the_models_files(model, places, tmp_path):
    MtebTasks([str(places[1])]).measure(wrapped(encoder_of(model), model), tmp_path)
    [path] = (tmp_path / "results").glob("local__model/*/pairs.json")
    assert path.parent.name == name_and_revision(model)[1] and len(path.parent.name) == 64
    result = json.loads(path.read_text())
    assert result["task_name"] == "pairs" and -1 < result["scores"]["test"][0]["cosine_spearman"] < 1


def test_two_folders_of_one_name_do_not_share_results(model, tmp_path):
    other = tmp_path / Path(model).name
    shutil.copytree(model, other)
    assert name_and_revision(str(other)) == name_and_revision(model)
    settings = other / "config_sentence_transformers.json"
    settings.write_text(settings.read_text().replace("the query asks for", "find"))
    assert name_and_revision(str(other))[0] == name_and_revision(model)[0]
    assert name_and_revision(str(other))[1] != name_and_revision(model)[1]


def test_a_task_from_files_is_measured_again_since_files_change(model, places, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    encoder = encoder_of(model)
    shutil.copy(places[1], pairs)
    before = MtebTasks([str(pairs)]).measure(wrapped(encoder, model), tmp_path)
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join([lines[0], *(f"{5 - int(line[0])}{line[1:]}" for line in lines[1:])]) + "\n")
    after = MtebTasks([str(pairs)]).measure(wrapped(encoder, model), tmp_path)
    assert after["pairs"] == pytest.approx(-before["pairs"], abs=1e-6)


def test_a_text_is_encoded_once_a_task_for_each_role(model, places, tmp_path):
    seen: list[tuple[str | None, str]] = []
    encoder = encoder_of(model)

    def counted(texts, role=None, /):
        seen.extend((role, text) for text in texts)
        return encoder(texts, role)

    counting = MtebModel(counted, model, dim=encoder.dim, params=encoder.params, truncate_dim=None, progress=False)
    MtebTasks([str(places[0])]).measure(counting, tmp_path)
    assert len(seen) == len(set(seen)) and {role for role, _ in seen} == {"query", "document"}


def test_tasks_and_benchmarks_are_found_by_mtebs_names():
    found = MtebTasks(["STSBenchmark", "NanoBEIR"])
    names = [task.metadata.name for task in found.public]
    assert names[0] == "STSBenchmark" and "NanoSciFactRetrieval" in names and not found.own


@pytest.mark.parametrize(
    "names, message",
    [(["STSBenchmarc"], "no such file or folder, and mteb has no task or benchmark of this name.*STSBenchmark"),
     (["STSBenchmark", "STSBenchmark"], "two tasks of --mteb are called STSBenchmark")],
)  # fmt: skip
def test_unknown_names_and_doubled_ones_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        MtebTasks(names)


def test_without_the_hub_the_error_is_one_line(model, tmp_path):
    with pytest.raises((OSError, ValueError), match=r"^--mteb: Couldn't reach 'mteb/stsbenchmark-sts'"):
        MtebTasks(["STSBenchmark"]).measure(wrapped(encoder_of(model), model), tmp_path)


def _measured_by_ranks(model: str, places: list[str], folder: str) -> dict[str, float] | None:
    encoder = encoder_of(model, device="cpu")
    tasks = MtebTasks(places) if rank() == 0 else None
    sizes = {"dim": encoder.dim, "params": encoder.params, "truncate_dim": None, "progress": False}
    return work_over_ranks(
        encoder, torch.device("cpu"), lambda encode: tasks.measure(MtebModel(encode, model, **sizes), Path(folder))
    )


def test_ranks_encode_together_and_give_the_results_of_one(model, places, tmp_path):
    alone = MtebTasks([*map(str, places)]).measure(wrapped(encoder_of(model), model), tmp_path / "alone")
    together, nothing = on_ranks(2, _measured_by_ranks, model, [*map(str, places)], str(tmp_path / "together"))
    assert nothing is None and list(together) == list(alone)
    assert np.allclose(list(together.values()), list(alone.values()), atol=1e-5)
