from distill.evaluation import table, throughput
from distill.evaluation.report import figure


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
