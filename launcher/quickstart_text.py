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
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill
from distill.run.files import publish
from launcher import command

OUT = Path("runs/quickstart-text/docstrings.txt")
MAX_SOURCE_BYTES = 2_000_000
FILES_PER_TASK = 64
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "dist-packages"}
THIS_PROJECT = Path(distill.__file__).resolve().parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

PROSE_SECTION = re.compile(
    r"(?:notes?|description|details|background|overview|introduction|summary|warnings?|discussion|usage"
    r"|important|tips?)\s*:?:?",
    re.IGNORECASE,
)
OTHER_SECTION = re.compile(
    r"(?:args?|arguments|parameters|params|other parameters|keyword args|keyword arguments|kwargs|returns?|yields?|receives"
    r"|raises|warns|attributes|methods|properties|inputs?|outputs?|shape|see also|references|examples?|todos?|authors?"
    r"|usage example)\s*:?:?",
    re.IGNORECASE,
)
UNDERLINE = re.compile(r"([-=~^*#+\"'`_])\1{2,}\s*")
NOT_PROSE = re.compile(  # the start of a line that is indented, an item of a list, code, or markup
    r" |(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-zA-Z][.)])\s+"
    r"|\s*(?:>>>|\.\.(?:\s|$)|[:@$|+#%!>{<\[\\]|[-=]{3}|https?://|\w+\s?:\s|\w+ = )"
)
MARKUP = [  # with its replacement: links, roles, code, emphasis, references, substitutions
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
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[\"'(]?[A-Z0-9])")
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?i:e\.?g|i\.?e|vs|cf|al|approx|resp|incl|fig|eq|eqs|sec|ch|no|vol|pp?|dr|mr|mrs|ms|prof|st|jr|inc|ltd|co"
    r"|dept|univ|ref|refs|def|viz|ca|w\.r\.t|a\.k\.a)\.$|\b[A-Z]\.$"
)
WORD = re.compile(r"[(\"']?[A-Za-z]+(?:['\u2019-][A-Za-z]+)*[,;:.!?)\"']*")
FORMULA = re.compile(r"[\\$`{}^|~\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=command.path, default=OUT, metavar="FILE", help=f"the text file (default {OUT})")
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
    files = [path for folder in (installed_folders() if folders is None else folders) for path in _python_files(folder)]
    num_workers = min(len(os.sched_getaffinity(0)), -(-len(files) // FILES_PER_TASK))
    if num_workers <= 1:
        for file in files:
            yield from _sentences_of_file(file)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        for sentences in pool.imap(_sentences_of_file, files, chunksize=FILES_PER_TASK):
            yield from sentences


def installed_folders() -> list[Path]:
    """The standard library and every folder of installed packages on sys.path, each once."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    paths += [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    return list(dict.fromkeys(Path(path).resolve() for path in paths if Path(path).is_dir()))


def docstrings_of_file(file: Path) -> list[str]:
    """The docstrings of a module and of its classes and functions; none if it cannot be read or parsed."""
    try:
        source = file.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_docstrings(ast.parse(source)))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


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
    for end in SENTENCE_END.finditer(paragraph):
        if not ABBREVIATION.search(paragraph[start : end.start()]):
            sentences.append(paragraph[start : end.end()].strip())
            start = end.end()
    return [*sentences, paragraph[start:].strip()]


def _sentences_of_file(file: Path) -> list[str]:
    return [sentence for docstring in docstrings_of_file(file) for sentence in sentences_of(docstring)]


def _python_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and Path(parent, name) != THIS_PROJECT)
        for path in (Path(parent, name) for name in sorted(names)):
            is_source = path.suffix == ".py" and not path.name.startswith("test_") and not path.name.endswith("_test.py")
            if is_source and path.is_file() and path.stat().st_size <= MAX_SOURCE_BYTES:
                yield path


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
        yield docstring
    for child in getattr(node, "body", []):
        yield from _docstrings(child)


def _paragraphs(docstring: str) -> Iterator[str]:
    """Unindented paragraphs outside of parameter lists and examples, their lines joined."""
    in_other_section = False
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        first, *lines = block.split("\n")
        heading = "" if first.startswith(" ") else first.strip()
        is_underlined = bool(lines and UNDERLINE.fullmatch(lines[0]))
        if OTHER_SECTION.fullmatch(heading):
            in_other_section = is_underlined  # without an underline, the section is this block alone
            continue
        if PROSE_SECTION.fullmatch(heading):
            in_other_section = False
            lines = [line.strip() for line in lines[is_underlined:]]
        elif is_underlined:
            in_other_section = False
            lines = lines[1:]
        else:
            lines = [first, *lines]
        if lines and not in_other_section and not any(NOT_PROSE.match(line) or UNDERLINE.fullmatch(line) for line in lines):
            yield " ".join(line.strip() for line in lines)


def _strip_markup(paragraph: str) -> str:
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())


def _reads_as_english(sentence: str) -> bool:
    words = sentence.split()
    if len(words) < 4 or not sentence[0].isupper() or sentence[-1] not in ".?!" or sentence.endswith(".."):
        return False
    if FORMULA.search(sentence) or sentence.count("(") != sentence.count(")"):
        return False
    num_plain = sum(WORD.fullmatch(word) is not None for word in words)
    num_letters = sum(character.isalpha() or character == " " for character in sentence)
    return num_plain >= 0.75 * len(words) and num_letters >= 0.88 * len(sentence)


if __name__ == "__main__":
    sys.exit(main())
