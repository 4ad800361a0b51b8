from distill.evaluation import table, throughput
from distill.evaluation.report import figure, tables


def test_absent_values_are_dashes_and_columns_are_aligned():
    rows = [
        {"model": "teacher", "params": 22_713_216, "dim": 384, "sts": {"AVG": 79.2, "AVG_OF": ["STS12", "STSB"]}},
        {
            "model": "a longer name",
            "fidelity": {"spearman": 0.8895, "spearman_top50": 0.6, "top10": 0.5},
            "sentences_per_second": 1234.5,
        },
    ]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["teacher", "22,713,216", "384", "-", "-", "79.20", "(2", "sets)", "-", "-", "-"]
    assert lines[3].split() == ["a", "longer", "name", "-", "-", "-", "1,234", "-", "0.889", "0.600", "0.500"]


def test_columns_are_the_callers():
    assert table([{"x": 1}, {"x": 0}], {"n": figure("x")}).splitlines() == ["n", "-", "1", "0"]


def test_throughput_counts_what_was_encoded_after_the_warm_up():
    calls = []
    rate = throughput(lambda sentences: calls.append(len(sentences)), [str(i) for i in range(300)] * 2, seconds=0.05)
    assert calls[:4] == [256, 256, 44, 256]
    assert rate > 0


RESULTS = {
    "model": "small",
    "bytes_per_vector": 64,
    "sts": {"STSB": 80.123, "AVG": 80.123, "AVG_OF": ["STSB"]},
    "sts_ci": {"STSB": [79.0, 81.5]},
    "retrieval": {
        "made": {
            **{"ndcg@10": 0.5, "recall@10": 0.6, "recall@100": 0.7, "mrr@10": 0.8},
            "binary+int8": {
                **{"ndcg@10": 0.4, "recall@10": 0.5, "recall@100": 0.6, "mrr@10": 0.7},
                **{"bytes_per_vector": 2, "rescore_bytes_per_vector": 16, "index_bytes": 3_000_000, "build_seconds": 0.5},
                **{"queries_per_second": 1234.4, "queries_per_second_batched": 99999.0},
            },
        }
    },
    "retrieval_ci": {"made": {"ndcg@10": [0.4, 0.6], "binary+int8": {"ndcg@10": [0.3, 0.5]}}},
    "retrieval_resamples": {
        "made": {"of": "0", "ndcg@10": [0.4, 0.5, 0.6], "binary+int8": {"ndcg@10": [0.3, 0.4, 0.5]}},
    },
    "transfer": {"kind": {"accuracy": 0.9, "majority": 0.5, "labels": 2, "train": 300, "test": 1000, "C": 4.0}},
    "transfer_ci": {"kind": {"accuracy": [0.88, 0.92]}},
}


def test_every_task_has_a_table_and_small_vectors_have_their_bytes_and_their_paired_loss():
    parts = [part.splitlines() for part in tables([RESULTS]).split("\n\n")]
    assert [part[0].split()[0] for part in parts] == ["model", "STS", "retrieval", "retrieval", "transfer"]
    assert parts[1][2].split() == ["STSB", "80.12", "79.00", "..", "81.50"]
    plain, small = parts[2][2:]
    assert plain.split()[:5] == ["made", "float32", "(numpy)", "64", "0.5000"]
    assert small.split() == [
        *("made", "binary+int8", "2", "+", "16", "0.4000", "0.5000", "0.6000", "0.7000", "0.3000", "..", "0.5000"),
        *("-0.1000", "-0.1000", "..", "-0.1000"),
    ]
    assert parts[3][2].split() == ["made", "binary+int8", "2", "+", "16", "3.00", "0.50", "1,234", "99,999"]
    assert parts[4][2].split() == ["kind", "0.9000", "0.8800", "..", "0.9200", "0.5000", "2", "1,000"]


def test_models_beside_each_other_are_named_in_every_row():
    text = tables([RESULTS, RESULTS | {"model": "large"}])
    assert all(line.split()[0] in ("model", "small", "large") or not line.strip("- ") for line in text.splitlines() if line)
    assert text.count("\nlarge") == 5


def test_without_resamples_there_are_no_intervals():
    bare = RESULTS | {
        "sts_ci": {},
        "retrieval_ci": {"made": {"binary+int8": {}}},
        "retrieval_resamples": {"made": {"of": "0", "ndcg@10": [], "binary+int8": {"ndcg@10": []}}},
        "transfer_ci": {"kind": {}},
    }
    assert ".." not in tables([bare]) and "-0.1000" in tables([bare])
