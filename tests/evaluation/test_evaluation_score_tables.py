"""Tables of results: every task has one, quantised vectors show their bytes and their paired loss."""

from __future__ import annotations

from distill.evaluation.score_tables import cell, detail_tables, format_results, table_of
from distill.metrics.results import ModelResults, Resampled


def resampled(score: float, values: list[float]) -> Resampled:
    return Resampled(score=score, sample="0", values=values)


COSTS = {"index_bytes": 3_000_000, "build_seconds": 0.5, "queries_per_second": 1234.4, "queries_per_second_batched": 99999.0}
RESULTS = ModelResults(
    dim=16,
    params=1000,
    bytes_per_vector=64,
    sts={"STSB": 80.123, "AVG": 80.123, "AVG_OF": ["STSB"]},
    sts_ci={"STSB": (79.0, 81.5)},
    sts_quantised={"int8": {"STSB": 79.0, "AVG": 79.0, "AVG_OF": ["STSB"]}},
    sts_resamples={"STS AVG": resampled(80.123, [80.0, 81.0]), "STS AVG int8": resampled(79.0, [79.0, 80.0])},
    retrieval={
        "made": {
            **{"ndcg@10": 0.5, "recall@10": 0.6, "recall@100": 0.7, "mrr@10": 0.8},
            "binary+int8": {
                **{"ndcg@10": 0.4, "recall@10": 0.5, "recall@100": 0.6, "mrr@10": 0.7},
                **{"bytes_per_vector": 2, "rescore_bytes_per_vector": 16, **COSTS},
            },
        }
    },
    retrieval_ci={"made": {"ndcg@10": (0.4, 0.6), "binary+int8": {"ndcg@10": (0.3, 0.5)}}},
    retrieval_resamples={
        "made ndcg@10": resampled(0.5, [0.4, 0.5, 0.6]),
        "made binary+int8 ndcg@10": resampled(0.4, [0.3, 0.4, 0.5]),
    },
    transfer={"kind": {"accuracy": 0.9, "majority": 0.5, "labels": 2, "train": 300, "test": 1000, "C": 4.0}},
    transfer_ci={"kind": {"accuracy": (0.88, 0.92)}},
)


def test_a_column_without_a_value_is_left_out_and_a_missing_cell_is_a_dash():
    table = table_of([{"a": "1", "b": None}, {"a": None, "b": None, "c": "2"}])
    assert (table.header, table.rows) == (["a", "c"], [["1", None], [None, "2"]])
    assert str(table).splitlines()[2:] == ["1  -", "-  2"]
    assert (cell(None, "{:.1f}"), cell(1.25, "{:.1f}"), cell((1.0, 2.0), "{:.1f}")) == (None, "1.2", "1.0 .. 2.0")


def test_a_model_has_its_size_its_average_and_its_fidelity_in_a_row():
    fidelity = {"spearman": 0.8895, "spearman_top50": 0.6, "top10": 0.5, "texts": 2000}
    teacher = ModelResults(dim=384, params=22_713_216, bytes_per_vector=1536, sts=RESULTS.sts, sts_ci=RESULTS.sts_ci)
    student = ModelResults(dim=64, params=1000, bytes_per_vector=256, texts_per_second=1234.5, fidelity=fidelity)
    lines = format_results({"teacher": teacher, "a longer name": student}).splitlines()
    assert lines[2].split() == ["teacher", "22,713,216", "384", "1536", "-", "80.12", "(1", "sets)", "-", "-", "-"]
    assert lines[3].split() == ["a", "longer", "name", "1,000", "64", "256", "1,234", "-", "0.889", "0.600", "0.500"]


def test_every_task_has_a_table_and_quantised_vectors_have_their_bytes_and_their_paired_loss():
    parts = [part.splitlines() for part in format_results({"small": RESULTS}).split("\n\n")]
    assert [part[0].split()[0] for part in parts] == ["model", "STS", "STS", "retrieval", "retrieval", "transfer"]
    assert parts[1][2].split() == ["STSB", "80.12", "79.00", "..", "81.50"]
    assert parts[2][2].split() == ["int8", "79.00", "-1.12", "-1.00", "..", "-1.00"]
    plain, small = parts[3][2:]
    assert plain.split()[:5] == ["made", "float32", "(numpy)", "64", "0.5000"]
    assert small.split() == [
        *("made", "binary+int8", "2", "+", "16", "0.4000", "0.5000", "0.6000", "0.7000", "0.3000", "..", "0.5000"),
        *("-0.1000", "-0.1000", "..", "-0.1000"),
    ]
    assert parts[4][2].split() == ["made", "binary+int8", "3.00", "0.50", "1,234", "99,999"]
    assert parts[5][2].split() == ["kind", "0.9000", "0.8800", "..", "0.9200", "0.5000", "2", "1,000"]


def test_models_side_by_side_are_named_in_every_row():
    tables = list(detail_tables({"small": RESULTS, "large": RESULTS}))
    assert len(tables) == 4 and all(table.header[0] == "model" for table in tables)
    assert all({row[0] for row in table.rows} == {"small", "large"} for table in tables)
    assert all(table.header[0] != "model" for table in detail_tables({"small": RESULTS}))


def test_without_resamples_there_are_no_intervals():
    bare = RESULTS.model_copy(
        update={
            "sts_ci": {},
            "sts_quantised": {},
            "retrieval_ci": {"made": {"binary+int8": {}}},
            "retrieval_resamples": {
                "made ndcg@10": resampled(0.5, []),
                "made binary+int8 ndcg@10": resampled(0.4, []),
            },
            "transfer_ci": {"kind": {}},
        }
    )
    text = format_results({"bare": bare})
    assert ".." not in text and "-0.1000" in text
