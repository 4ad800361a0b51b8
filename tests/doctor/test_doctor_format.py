"""What the doctor prints: a summary line, a table of the checks on request, and every finding with its fix."""

from __future__ import annotations

import re

import pytest
from commands import ROOT
from conftest import write_config
from facts import diagnosis_of, reports

from distill.doctor.diagnosis import ROWS, format_diagnosis


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def test_one_line_where_all_is_well(config):
    line = format_diagnosis(diagnosis_of(config, reports(2)), with_table=False)
    assert line == "doctor: 2 nodes, 2 processes: all is well (all-reduce 1.2 GB/s)"


def test_the_table_has_a_row_per_check(config):
    lines = format_diagnosis(diagnosis_of(config, reports(2)), with_table=True).splitlines()
    assert [line.split()[0] for line in lines[4:]] == list(ROWS)
    assert re.fullmatch(r"names +fine +n1 = 10.0.0.1", next(line for line in lines if line.startswith("names")))


def test_faults_come_first_each_with_its_fix(config):
    found = diagnosis_of(config, reports(2, limits={"files": 256}, shm={"free": 0}))
    lines = format_diagnosis(found, with_table=False).splitlines()
    assert lines[0] == "doctor: 2 nodes, 2 processes: 1 fault, 1 warning (all-reduce 1.2 GB/s)"
    explained = [line for line in lines if line.startswith(("FAULT ", "warning "))]
    assert explained[0].startswith("FAULT  shm  n2: ") and explained[1].startswith("warning  limits  n2: ")
    assert sum(line.startswith("  fix: ") for line in lines) == 2


def test_many_nodes_share_rows_and_findings(config):
    many = reports(64)
    for rank in range(10, 14):
        many[rank]["facts"]["shm"]["free"] = 0
    lines = format_diagnosis(diagnosis_of(config, many), with_table=True).splitlines()
    assert max(len(line) for line in lines[:16]) < 100
    assert "FAULT   n11, n12, n13 and 1 more" in next(line for line in lines if line.startswith("shm"))
    assert sum(line.startswith("FAULT  shm  ") for line in lines) == 4  # each fix names its node


def test_the_guide_explains_each_check_in_the_order_of_the_table():
    guide = (ROOT / "slurm/README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| [^|]+ \|$", guide[guide.index("| check |") :], flags=re.MULTILINE)
    assert rows[1:] == list(ROWS)
