"""launcher/search.py: which run it searches, and what it refuses. test_end_to_end.py searches a finished run."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from launcher.search import search


def arguments(run, count=5):
    return argparse.Namespace(run=Path(run), count=count, asymmetric=False, question="which one?")


@pytest.mark.parametrize("name", ["2024", "on", "1.50"])
def test_a_run_is_found_by_its_directory_whatever_its_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("name: x\ntext: {sources: [text.txt]}\nteacher: {model: some/teacher}\n")
    monkeypatch.chdir(tmp_path / name)
    for run in (".", tmp_path / name):
        with pytest.raises(ValueError, match=f"nothing to search in {tmp_path / name}"):
            search(arguments(run))


def test_no_run_and_no_answers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        search(arguments(tmp_path))
    with pytest.raises(ValueError, match="--count is 0: it must be at least 1"):
        search(arguments(tmp_path, count=0))
