"""One line where all is well; else a table, and every finding with its fix."""

from __future__ import annotations

import re

import pytest
from commands import ROOT
from conftest import write_config
from healthy import evidence, start_of

from distill.doctor.checks import CHECKS
from distill.doctor.diagnosis import NETWORK, REPORTS, diagnose
from distill.doctor.table import printed


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def test_one_line_where_all_is_well(config):
    line = printed(diagnose(start_of(config), evidence()), always_table=False)
    assert line == "doctor: 2 nodes, 2 processes: all is well (all-reduce 1.2 GB/s)"


def test_a_terminal_has_the_table_as_well(config):
    lines = printed(diagnose(start_of(config), evidence()), always_table=True).splitlines()
    assert "all is well" in lines[0] and lines[2].split() == ["n1", "n2"]
    assert any(line.startswith("names") and "n2 = 10.0.0.2" in line for line in lines)


def test_faults_come_first_each_with_its_fix(config):
    text = printed(diagnose(start_of(config), evidence(limits={"files": 256}, shm={"free": 0})), always_table=False)
    lines = text.splitlines()
    assert lines[0] == "doctor: 2 nodes, 2 processes: 1 fault, 1 warning (all-reduce 1.2 GB/s)"
    explained = [line for line in lines if line.startswith(("FAULT ", "warning "))]
    assert explained[0].startswith("FAULT  shm  n2: ") and explained[1].startswith("warning  limits  n2: ")
    assert sum(line.startswith("  fix: ") for line in lines) == 2


def test_many_nodes_share_columns_and_lines(config):
    many = evidence(64)
    for rank in range(10, 14):
        many.by_files[rank]["facts"]["shm"]["free"] = 0
    lines = printed(diagnose(start_of(config, 64), many), always_table=False).splitlines()
    assert max(map(len, lines[:16])) < 128
    assert "n1, n2, n3 and 57 more" in lines[2] and "n11, n12, n13 and 1 more" in lines[2]


def test_the_guide_explains_each_check_in_the_order_of_the_table():
    guide = (ROOT / "slurm/README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| [^|]+ \|$", guide[guide.index("| check |") :], flags=re.MULTILINE)
    assert rows[1:] == [REPORTS, NETWORK, *(check.name for check in CHECKS)]
