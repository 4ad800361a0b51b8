"""The pages of the documentation: their commands, links and the paths that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import ROOT
from readme import BLOCK, blocks_of

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "launcher/guides").glob("*.md"))
FOLDERS = ("configs", "distill", "slurm", "tests")
PAGES = [README, *GUIDES, *(ROOT / folder / "README.md" for folder in FOLDERS), ROOT / "tests/bench/RESULTS.md"]
PROGRAMS = ("python", "bash", "deepspeed", "torchrun", "sbatch", "srun")
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z_]+")


@dataclass(frozen=True)
class Command:
    """One command of a page, as words."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {' '.join(self.words)}"

    @property
    def script(self) -> Path | None:
        """The script of this repository that the command starts."""
        return next((ROOT / word for word in self.words if _is_script(word)), None)

    @property
    def arguments(self) -> list[str]:
        """The words after the script."""
        index = next(index for index, word in enumerate(self.words) if _is_script(word))
        return list(self.words[index + 1 :])


def _is_script(word: str) -> bool:
    return re.fullmatch(r"(launcher|slurm|tests)/[\w./-]+\.(py|sh)", word) is not None


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose_of(page: Path) -> str:
    """The text without fenced blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of all Bash blocks, each part of a pipe alone, and those in the prose that begin with a program."""
    for block in blocks_of(page):
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from _split(page, line)
    for found in INLINE.findall(prose_of(page)):
        line = " ".join(found.split()).replace(" [key=value ...]", "")
        if line.startswith(tuple(f"{program} " for program in PROGRAMS)):
            yield from _split(page, line)


def _split(page: Path, line: str) -> Iterator[Command]:
    line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip())
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "|"]:
        if word not in ("|", "&&"):
            words.append(word)
        elif words:
            yield Command(page, tuple(words))
            words = []


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = (INLINE.sub(r"\1", heading).lower() for heading in HEADING.findall(prose_of(page)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[tuple[Path, str]]:
    """The targets of relative links, each with its anchor or ''."""
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in LINK.findall(prose_of(page))]


def paths_of(page: Path) -> list[Path]:
    """Paths of this repository that the prose names in backticks."""
    named = re.compile(r"(?:configs|launcher|slurm|tests)/[\w./-]*|distill/[\w./-]+")
    return [ROOT / found for found in INLINE.findall(prose_of(page)) if named.fullmatch(found)]
