"""What the documentation shows can be run: commands are parsed, configs loaded, snippets run, links and paths followed.

`bash tests/run.sh --readme` runs the blocks of README.md in a fresh clone.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, environment
from conftest import WORDS
from pages import GUIDES, PAGES, PLACEHOLDER, README, Command, anchors_of, commands_of, links_of, page_id, paths_of
from readme import RUN_BY_TESTS, Block, Clone, blocks_of, outcome
from reference_times import hang_limit

from distill.config import load_config
from distill.report.__main__ import main as report
from distill.shards.__main__ import main as shards
from distill.study.study_configs import read_study

BLOCKS = [pytest.param(block, id=f"{page_id(page)}:{block.line}") for page in PAGES for block in blocks_of(page)]
COMMANDS = [pytest.param(command, id=str(command)) for page in PAGES for command in commands_of(page)]
OTHER_PROGRAMS = {"apptainer", "cp", "head", "hf", "sed", "source", "tensorboard", "touch", "zcat"}
MODULES = {"distill.shards": shards, "distill.report": report}
LONGEST = 100  # columns of a command
MADE_BY_USER = {ROOT / "slurm/site.sh", ROOT / "configs/mine.yaml"}


class Parsed(Exception):
    """Carries what a command's argument parser has accepted."""


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives the arguments which `main(argv)` parses, and runs nothing else of it."""

    def parse(main: Any, argv: list[str]) -> argparse.Namespace:
        with pytest.raises(Parsed) as caught:
            main(argv)
        return caught.value.args[0]

    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def then_stop(self: Any, args: Any = None, namespace: Any = None, original: Any = original) -> None:
            raise Parsed(original(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, then_stop)
    monkeypatch.chdir(ROOT)
    return parse


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """configs/mine.yaml as the README shows it."""
    path = tmp_path / "mine.yaml"
    path.write_text(next(block.text for block in blocks_of(README) if block.text.startswith("# configs/mine.yaml")))
    return path


def test_readme_is_short_and_leads_to_every_page():
    assert len(README.read_text().splitlines()) <= 200
    assert set(PAGES) - {README} <= {target for target, _ in links_of(README)}
    assert len(GUIDES) == 10


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_page_has_no_comments_and_its_links_and_paths_exist(page: Path):
    assert "<!--" not in page.read_text(encoding="utf-8")
    for target, anchor in links_of(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors_of(target), (target, anchor)
    for path in paths_of(page):
        assert path.exists() or path in MADE_BY_USER, path


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_code_of_a_known_language(block: Block):
    if block.language == "bash":
        read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert read.returncode == 0, read.stderr
        assert max(map(len, block.text.splitlines())) <= LONGEST
    elif block.language == "python":
        compile(block.text, str(block.line), "exec")
    elif block.language == "toml":
        tomllib.loads(block.text)
    else:
        assert block.language in ("", "yaml")


@pytest.mark.parametrize("block", [case for case in BLOCKS if case.values[0].language == "yaml"])
def test_a_yaml_block_is_a_config(block: Block, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text(block.text)
    load_config(ROOT / "configs/own.yaml", over=over)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted_and_its_config_loads(command: Command, accepted, mine):
    words, script = command.words, command.script
    if script is None or words[0] in OTHER_PROGRAMS:
        if words[:2] == ("python", "-m"):
            accepted(MODULES[words[2]], list(words[3:]))
        else:
            assert words[0] in OTHER_PROGRAMS, f"neither a script of this repository nor a known program: {command}"
        return
    assert script.is_file(), script
    named = {"configs/mine.yaml": str(mine)}
    arguments = [str(mine) if PLACEHOLDER.fullmatch(word) else named.get(word, word) for word in command.arguments]
    if script.parent == ROOT / "slurm":
        config, *overrides = arguments
        load_config(config, overrides)
    elif script.parent == ROOT / "launcher" and script.suffix == ".py":
        parsed = accepted(importlib.import_module(f"launcher.{script.stem}").main, arguments)
        if script.stem == "study":
            read_study(parsed.folder, parsed.over, parsed.overrides)
        elif getattr(parsed, "config", None):
            load_config(parsed.config, parsed.overrides)
    else:  # a benchmark or a shell script, whose options are in its text or in that of what it shares
        known = script.read_text() + (ROOT / "tests/bench/ckd_run.py").read_text()
        for option in (word for word in arguments if word.startswith("--")):
            assert option in known, option


def test_extras_that_the_pages_install_are_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = [command.arguments for page in PAGES for command in commands_of(page) if "launcher/install.sh" in command.words]
    extras = {extra for arguments in installed for argument in arguments for extra in argument.split(",")}
    assert extras and extras <= set(declared)


def test_the_tests_that_run_commands_exist():
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in RUN_BY_TESTS.values():
        assert f"def {test}(" in code, test


def test_blocks_share_an_environment_and_one_that_fails_is_seen(tmp_path):
    (tmp_path / ".git").mkdir()
    clone = Clone(tmp_path)
    texts = {
        "export SEEN=1\ncd /": "run",
        'test "$SEEN" = 1 && test ! "$PWD" = /': "run",
        "false\ntrue": "FAILED",
        "exit 3": "FAILED",
        "true\ntensorboard --no-such-option": "run",
        "sbatch --nodes 2": "run by a test",
    }
    for text, result in texts.items():
        assert outcome(clone, Block(1, "bash", text)).startswith(result), text
    assert outcome(clone, Block(1, "", "a table")) == "not a command"


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
def test_snippets_run_as_they_are(as_the_quickstart):
    pages = [README, *GUIDES]
    snippets = [block.text for page in pages for block in blocks_of(page) if block.language == "python"]
    assert len(snippets) > 5
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


@pytest.mark.slow
def test_the_objectives_of_the_library_page_train(embedded_copy, tmp_path):
    """The loss term and the task of distill/README.md, installed as a package beside this one."""
    config, run = embedded_copy
    installed = tmp_path / "site"
    for block in blocks_of(ROOT / "distill/README.md"):
        if block.language == "python":
            path = installed / re.match(r"# (\S+)\n", block.text)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.language == "toml":
            groups = tomllib.loads(block.text)["project"]["entry-points"]
    metadata = installed / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entry.items()) for group, entry in groups.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    variables = environment() | {"PYTHONPATH": f"{installed}:{ROOT}"}
    for overrides in (["stage=ckd", "ckd.weights={huber: 1}"], ["stage=align", "align.max_steps=2", "align.global_batch=32"]):
        command = [sys.executable, str(ROOT / "launcher/train.py"), "--config", str(config), *overrides]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=hang_limit())
        assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "ckd/DONE.json").exists() and (run / "align/student/student.json").exists()
