#!/usr/bin/env python3
"""Writes the quickstart's text: the English sentences of the docstrings of the installed Python packages, one a line.

    python launcher/quickstart_text.py [--out runs/quickstart-text/docstrings.txt]

A file that is there is kept, since installing a package would change the text under a run that was made from it. Reads .py
files by `ast`, without importing them. Parameter lists, code, tables and directives are left out; a sentence is kept if it
starts and ends like one and consists mostly of words.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import multiprocessing
import os
import re
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill
from distill.run.files import publish

OUT = Path("runs/quickstart-text/docstrings.txt")
MAX_SOURCE_BYTES = 2_000_000
FILES_PER_TASK = 64
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "dist-packages"}
_THIS_PROJECT = Path(distill.__file__).resolve().parent
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_PROSE_SECTIONS = (
    "notes?|description|details|background|overview|introduction|summary|warnings?|discussion|usage|important|tips?"
)
_PROSE_SECTION = re.compile(rf"(?:{_PROSE_SECTIONS})\s*:?:?", re.I)
_SECTION = re.compile(
    r"(?:args?|arguments|parameters|params|other parameters|keyword args|keyword arguments|kwargs|returns?|yields?|receives"
    r"|raises|warns|attributes|methods|properties|inputs?|outputs?|shape|see also|references|examples?"
    r"|todos?|authors?|usage example"
    rf"|{_PROSE_SECTIONS})\s*:?:?",
    re.I,
)
_UNDERLINE = re.compile(r"([-=~^*#+\"'`_])\1{2,}\s*")
_BULLET = re.compile(r"(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-zA-Z][.)])\s+")
_NOT_PROSE = re.compile(r"\s*(?:>>>|\.\.(?:\s|$)|[:@$|+#%!>{<\[\\]|[-=]{3}|https?://|\w+\s?:\s|\w+ = )")

_MARKUP = [
    (re.compile(r"\[([^\]]+)\]\(\S*?\)"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r":[a-zA-Z][\w:+.-]*:`!?~(?:[^`]*\.)?([^`.]*)`"), r"\1"),
    (re.compile(r":[a-zA-Z][\w:+.-]*:`!?([^`]*)`"), r"\1"),
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`']+)[`']_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}([^\s*](?:[^*]*[^\s*])?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[[\w, -]+\]_(?!\w)"), ""),
    (re.compile(r"\|(\w+)\|"), r"\1"),
]

_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(]?[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?i:e\.?g|i\.?e|vs|cf|al|approx|resp|incl|fig|eq|eqs|sec|ch|no|vol|pp?|dr|mr|mrs|ms|prof|st|jr|inc|ltd|co"
    r"|dept|univ|ref|refs|def|viz|ca|w\.r\.t|a\.k\.a)\.$|\b[A-Z]\.$"
)
_WORD = re.compile(r"[(\"']?[A-Za-z]+(?:['\u2019-][A-Za-z]+)*[,;:.!?)\"']*")
_FORMULA = re.compile(r"[\\$`{}^|~\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"the text file (default {OUT})")
    out: Path = parser.parse_args(argv).out
    if out.exists():
        print(f"{out}: kept as it is")
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    sentences = list(read_docstrings())
    with publish(out) as file:
        file.write("".join(f"{sentence}\n" for sentence in sentences).encode())
    print(f"{out}: {len(sentences):,} sentences")
    return 0


def read_docstrings(folders: Sequence[Path] | None = None) -> Iterator[str]:
    """The English sentences of the docstrings below `folders`; None takes the standard library and all installed packages.

    Duplicates are not removed. The order depends on the files alone. Files with tests, syntax errors or more than
    MAX_SOURCE_BYTES are skipped. Parses in as many spawned processes as there are processors.
    """
    files = [str(path) for folder in (installed_folders() if folders is None else folders) for path in _python_files(folder)]
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    num_workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(tasks))
    if num_workers <= 1:
        for task in tasks:
            yield from sentences_of_files(task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_exit_with_parent) as pool:
        try:
            for sentences in pool.map(sentences_of_files, tasks):
                yield from sentences
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def installed_folders() -> list[Path]:
    """The standard library and every folder of installed packages on sys.path, each once."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    paths += [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    return list(dict.fromkeys(Path(path).resolve() for path in paths if Path(path).is_dir()))


def sentences_of_files(files: Sequence[str]) -> list[str]:
    """The sentences of the docstrings of these .py files, in their order."""
    return [sentence for file in files for docstring in docstrings_of_file(file) for sentence in sentences_of(docstring)]


def docstrings_of_file(file: str) -> list[str]:
    """The docstrings of a module and of its classes and functions; none if it cannot be read or parsed."""
    try:
        source = Path(file).read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [docstring for node in _documented_nodes(tree) if (docstring := ast.get_docstring(node, clean=False))]


def sentences_of(docstring: str) -> list[str]:
    """The sentences of a docstring that read as English prose, in their order, without markup."""
    return [
        sentence
        for paragraph in _paragraphs(docstring)
        for sentence in split_sentences(_strip_markup(paragraph))
        if _reads_as_english(sentence)
    ]


def split_sentences(paragraph: str) -> list[str]:
    """Cuts where . ? or ! ends a sentence; not after an abbreviation, an initial, or inside a number."""
    sentences, start = [], 0
    for end in _END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[start : end.start()]):
            sentences.append(paragraph[start : end.end()].strip())
            start = end.end()
    return [*sentences, paragraph[start:].strip()]


def _exit_with_parent() -> None:
    """Exits when the parent is killed; without it, the worker would wait for its next task indefinitely."""

    def watch(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _python_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and Path(parent, name) != _THIS_PROJECT)
        for name in sorted(names):
            path = Path(parent, name)
            is_source = name.endswith(".py") and not name.startswith("test_") and not name.endswith("_test.py")
            if is_source and path.is_file() and path.stat().st_size <= MAX_SOURCE_BYTES:
                yield path


def _documented_nodes(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _DOCUMENTED):
            yield node
        waiting += [child for child in reversed(getattr(node, "body", [])) if hasattr(child, "body")]


def _paragraphs(docstring: str) -> Iterator[str]:
    """Unindented paragraphs outside of parameter lists and examples, their lines joined."""
    skipped_section = False
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = block.split("\n")
        if _SECTION.fullmatch(lines[0].strip()) and lines[0][:1] != " ":
            skipped_section = not _PROSE_SECTION.fullmatch(lines[0].strip())
            underlined = len(lines) > 1 and _UNDERLINE.fullmatch(lines[1])
            lines = [line.strip() for line in lines[2:]] if underlined else [line.strip() for line in lines[1:]]
            if not underlined and skipped_section:
                skipped_section = False
                continue
        elif len(lines) > 1 and _UNDERLINE.fullmatch(lines[1]):
            skipped_section = False
            lines = lines[2:]
        if not skipped_section and _is_prose(lines):
            yield " ".join(line.strip() for line in lines)


def _is_prose(lines: list[str]) -> bool:
    return bool(lines) and not any(
        line[:1] == " " or _NOT_PROSE.match(line) or _BULLET.match(line) or _UNDERLINE.fullmatch(line) for line in lines
    )


def _strip_markup(paragraph: str) -> str:
    for pattern, replacement in _MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())


def _reads_as_english(sentence: str) -> bool:
    words = sentence.split()
    if len(words) < 4 or not sentence[0].isupper() or sentence[-1] not in ".?!" or sentence.endswith(".."):
        return False
    if _FORMULA.search(sentence) or sentence.count("(") != sentence.count(")"):
        return False
    num_plain = sum(_WORD.fullmatch(word) is not None for word in words)
    num_letters = sum(character.isalpha() or character == " " for character in sentence)
    return num_plain >= 0.75 * len(words) and num_letters >= 0.88 * len(sentence)


if __name__ == "__main__":
    sys.exit(main())
