"""What README.md and the guides show can be run as it stands; `bash tests/run.sh --readme` runs it."""

from __future__ import annotations

import gzip
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment
from conftest import WORDS
from readme import Block, Clone, blocks_of, outcome
from reference_times import hang_limit

from distill.config import load_config

GUIDES = sorted((ROOT / "launcher/guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "configs/README.md", *GUIDES]
BLOCKS = [pytest.param(block, id=f"{page.name}:{block.line}") for page in PAGES for block in blocks_of(page)]


def test_the_guides_are_there_and_no_block_escapes():
    assert len(GUIDES) == 6
    for page in PAGES:
        assert page.read_text().count("\n```") == 2 * len(blocks_of(page)), page


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_can_be_run_or_names_the_test_that_does(block: Block):
    assert block.language in ("bash", "python", "yaml", "")
    assert block.reason or block.language
    if block.language == "bash":
        read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert read.returncode == 0, read.stderr
    if block.language == "python":
        compile(block.text, str(block.line), "exec")


@pytest.mark.parametrize("block", [case for case in BLOCKS if case.values[0].language == "yaml"])
def test_yaml_is_a_config(block: Block, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text(block.text)
    load_config(ROOT / "configs/own.yaml", over=over)


@pytest.mark.parametrize("block", [case for case in BLOCKS if case.values[0].language == "bash"])
def test_a_command_names_files_options_and_keys_that_there_are(block: Block):
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        scripts = [ROOT / word for word in words if re.fullmatch(r"(launcher|slurm|tests)/[\w.-]+\.(py|sh)", word)]
        for script in scripts:
            assert script.is_file() or script.name == "site.sh", script  # which one makes oneself
        options = [word for word in words if re.fullmatch(r"--[a-z][\w-]*", word)]
        if scripts and scripts[0].suffix == ".py":
            known = script_and_command(scripts[0])
            for option in words_after(words, scripts[0]):
                assert option not in options or f'"{option}"' in known, (option, line)
        overrides = [word for word in words if re.fullmatch(r"[a-z_.0-9]+=.*", word)]
        if overrides and scripts:
            load_config(ROOT / "configs/own.yaml", overrides)


def script_and_command(script: Path) -> str:
    return script.read_text() + (ROOT / "launcher/command.py").read_text()


def words_after(words: list[str], script: Path) -> list[str]:
    return words[words.index(str(script.relative_to(ROOT))) :]


def test_blocks_share_an_environment_and_one_that_fails_is_seen(tmp_path):
    (tmp_path / ".git").mkdir()
    clone = Clone(tmp_path)
    texts = {
        "export SEEN=1\ncd /": "run",
        'test "$SEEN" = 1 && test ! "$PWD" = /': "run",
        "false\ntrue": "FAILED",
        "exit 3": "FAILED",
    }
    for text, result in texts.items():
        assert outcome(clone, Block(1, "bash", text, "")).startswith(result), text
    assert outcome(clone, Block(1, "bash", "false", "cannot run: it would fail")) == "cannot run: it would fail"
    for mark in ("covered by tests/none.py", "covered by tests/readme.py::test_none", "because"):
        with pytest.raises(ValueError, match="line 1"):
            _ = Block(1, "bash", "true", mark).reason


@pytest.fixture(scope="module")
def as_the_quickstart(finished, tmp_path_factory) -> Path:
    """A folder in which runs/quickstart is a finished run, and data/sts an STS set."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "runs").mkdir()
    (folder / "runs/quickstart").symlink_to(finished[1])
    (folder / "data/sts").mkdir(parents=True)
    rows = [f"{i % 6}\t{' '.join(WORDS[i : i + 5])}\t{' '.join(WORDS[i + 2 : i + 7])}" for i in range(30)]
    text = "\n".join(["score\tsentence1\tsentence2", *rows])
    (folder / "data/sts/stsb_test.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "launcher/guides/library.md"], ids=lambda page: page.name)
def test_snippets_run_as_they_stand(page: Path, as_the_quickstart):
    snippets = [block.text for block in blocks_of(page) if block.language == "python"]
    assert len(snippets) == 4
    each_alone = "".join(f"exec(compile({text!r}, 'snippet {number}', 'exec'), {{}})\n" for number, text in enumerate(snippets))
    variables = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", each_alone],
        cwd=as_the_quickstart,
        env=variables,
        capture_output=True,
        text=True,
        timeout=hang_limit(),
    )
    assert done.returncode == 0, done.stderr
