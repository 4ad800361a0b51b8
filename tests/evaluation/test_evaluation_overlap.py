"""Texts of evaluation sets that are among a run's training texts are counted, and shown with the results."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from retrieval_sets import write_folder

from distill.evaluation import overlap
from distill.evaluation.overlap import training_overlap
from distill.evaluation.score_tables import format_results
from distill.evaluation.tasks import read_tasks
from distill.metrics.results import ModelResults, Overlap
from distill.report.model_cards import results_section
from distill.shards import ShardReader
from distill.shards.format import HELD_OUT


@pytest.fixture
def reader(embedded_once) -> ShardReader:
    return ShardReader(embedded_once / "runs/tiny/shards")


@pytest.fixture
def tasks(reader, tmp_path):
    """Three training texts as queries, one of them twice, and a held-out one; two of the documents with other whitespace."""
    trained = reader.texts(np.arange(0, len(reader), len(reader) // 7))
    held_out = ShardReader(reader.directory / HELD_OUT).texts(np.arange(1))[0]
    queries = [("1", trained[0]), ("2", trained[1]), ("3", trained[0]), ("4", held_out), ("5", trained[2])]
    documents = [("1", "", trained[3].replace(" ", "  ")), ("2", "", f" {trained[4]}\u200b"), ("3", "", "unseen")]
    qrels = "".join(f"{query}\t3\t1\n" for query, _ in queries)
    found = write_folder(tmp_path / "found", qrels, documents=documents, queries=queries)
    sts = tmp_path / "sts"
    sts.mkdir()
    pairs = [f"1\t{trained[5]}\t{trained[5].upper()}", "2\tunseen\tunheard", "3\tunseen\tunread"]
    (sts / "stsb_test.tsv.gz").write_bytes(gzip.compress("\n".join(["score\tsentence1\tsentence2", *pairs]).encode()))
    return read_tasks(str(sts), [str(found)])


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_distinct_texts_are_counted_in_their_normal_form_and_held_out_ones_are_not(reader, tasks, monkeypatch, block):
    monkeypatch.setattr(overlap, "BLOCK_ROWS", block)
    assert training_overlap(tasks, reader) == {
        "STSB": {"texts": Overlap(found=1, texts=5)},
        "found": {"queries": Overlap(found=3, texts=4), "documents": Overlap(found=2, texts=3)},
    }


def test_a_run_without_sets_has_none(reader):
    assert training_overlap(read_tasks(), reader) == {}


def test_the_table_and_the_card_show_it_once():
    counted = {"found": {"queries": Overlap(found=1, texts=2500), "documents": Overlap(found=0, texts=3)}}
    plain = {"dim": 8, "params": 9, "bytes_per_vector": 32}
    results = {"teacher": ModelResults(**plain), **{name: ModelResults(**plain, overlap=counted) for name in ("ckd", "hpd")}}
    table = format_results(results)
    assert table.count("in the training text") == 1 and table.count("found queries") == 1
    shown = "Texts of these sets that are in the training text: found: 1 of 2,500 queries, found: none of 3 documents."
    assert shown in results_section("hpd", results)
