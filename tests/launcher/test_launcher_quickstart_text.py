"""Sentences of docstrings: prose is kept, everything else is dropped, and no code runs."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference_times import starts

from launcher import quickstart_text
from launcher.quickstart_text import docstrings_of_file, installed_folders, read_docstrings, sentences_of, split_sentences

NUMPY_STYLE = """
    Return the sum of array elements over a given axis, in
    a type that is wide enough.  Uses :class:`~numpy.ndarray` and ``dtype``.

    Parameters
    ----------
    a : array_like
        Elements to sum over all of the axes.

    Notes
    -----
    Arithmetic is **modular** when using integer types, e.g. Int. No error is raised on overflow [1]_.

    .. math:: This is not a sentence of English.

    >>> np.sum([0.5, 1.5])
    2.0

    Examples
    --------
    This sentence belongs to the examples of it.
"""
GOOGLE_STYLE = """Opens the file at version 3.11 of the format! Is it closed again afterwards?

    Args:
        path: The path of the file that is opened.

    Returns:
        The handle of the file that was opened.

    The handle must be closed by the caller::

        handle.close() is what this does here.

    - A list item that has several words.

    :param mode: The mode that is used to open.
    :returns: Nothing that is worth having.

    https://example.com/a/page.html is where it is.
"""


def test_prose_of_a_numpy_docstring_is_kept_without_its_tables_and_markup():
    assert sentences_of(NUMPY_STYLE) == [
        "Return the sum of array elements over a given axis, in a type that is wide enough.",
        "Uses ndarray and dtype.",
        "Arithmetic is modular when using integer types, e.g. Int.",
        "No error is raised on overflow.",
    ]


def test_prose_of_a_google_docstring_is_kept_without_its_arguments():
    assert sentences_of(GOOGLE_STYLE) == ["Opens the file at version 3.11 of the format!", "Is it closed again afterwards?"]


@pytest.mark.parametrize(
    "paragraph",
    [
        "Compare it, i.e. The other one, with version 1.2. or so.",
        "See Smith et al. The proof is by D. Knuth.",
        "One vs. Two is what Dr. Who said in Fig. 3.",
    ],
)
def test_an_abbreviation_ends_no_sentence(paragraph):
    assert split_sentences(paragraph) == [paragraph]


def test_an_ordinary_end_is_one():
    assert split_sentences('It works in x. This is "done." Is (it?) Yes!') == [
        "It works in x.",
        'This is "done."',
        "Is (it?)",
        "Yes!",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "lower case starts this one.",
        "No end of it here",
        r"The value of \alpha is two here.",
        "x = f(a, b) + g(c) - 12 * h(d)[0].",
        "It ends in an ellipsis...",
    ],
)
def test_what_does_not_read_as_english_is_dropped(text):
    assert sentences_of(text) == []


@pytest.fixture
def packages(tmp_path):
    for name, text in {
        "b/one.py": "first",
        "a/two.py": "second",
        "a/tests/three.py": "hidden",
        "test_four.py": "hidden",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""This is the {text} docstring."""\nopen("ran", "w")\n')
    (tmp_path / "a/broken.py").write_text('"""This is the broken docstring."""\ndef f(:')
    (tmp_path / "a/bytes.py").write_bytes(b'"""This is no UTF-8 \xff docstring."""\n')
    return tmp_path


def test_files_are_read_in_sorted_order_without_tests_and_never_run(packages, monkeypatch):
    monkeypatch.chdir(packages)
    assert list(read_docstrings([packages])) == ["This is the second docstring.", "This is the first docstring."]
    assert not (packages / "ran").exists()


def test_the_text_file_is_written_once_and_then_kept(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart_text, "installed_folders", lambda: [packages])
    out = tmp_path / "texts/docstrings.txt"
    assert quickstart_text.main(["--out", str(out)]) == 0
    assert out.read_text() == "This is the second docstring.\nThis is the first docstring.\n"
    (packages / "b/more.py").write_text('"""This is one more docstring."""')
    assert quickstart_text.main(["--out", str(out)]) == 0
    assert "This is one more docstring." not in out.read_text()
    assert "2 sentences" in capsys.readouterr().out


def test_processes_keep_the_order_and_a_reader_may_stop_early(tmp_path):
    for number in range(200):
        (tmp_path / f"m{number:03d}.py").write_text(f'"""This is the docstring of module {number}."""\n')
    expected = [f"This is the docstring of module {number}." for number in range(200)]
    assert list(read_docstrings([tmp_path])) == expected
    assert list(itertools.islice(read_docstrings([tmp_path]), 3)) == expected[:3]


READS_FOR_LONG = """
import multiprocessing, sys, time
from pathlib import Path
from launcher.quickstart_text import read_docstrings
if __name__ == "__main__":
    next(read := read_docstrings([Path(sys.argv[1])]))
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_no_worker_outlives_a_killed_reader(tmp_path):
    for number in range(200):
        (tmp_path / f"m{number:03d}.py").write_text('"""This is the docstring of a module."""\n')
    (tmp_path / "reader.py").write_text(READS_FOR_LONG)
    command = [sys.executable, tmp_path / "reader.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(quickstart_text.__file__).parents[1])}
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert reader.stdout is not None
    workers = reader.stdout.readline().split()
    limit = starts(1)
    reader.kill()
    reader.communicate()
    deadline = time.monotonic() + limit
    while any(map(_is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, workers))


def _is_running(pid):
    status = Path("/proc", pid, "stat")
    return status.exists() and status.read_text(encoding="utf-8").rsplit(")")[-1].split()[0] != "Z"


def test_docstrings_of_modules_classes_and_functions_are_found(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\nclass A:\n  """Class."""\n  async def f(self):\n    """Method."""\n'
        'if True:\n  def g():\n    """Function."""\n    "no docstring"\n'
    )
    assert docstrings_of_file(path) == ["Module.", "Class.", "Method.", "Function."]


def test_installed_folders_hold_the_standard_library_and_packages():
    folders = installed_folders()
    assert len(folders) == len(set(folders))
    assert any((folder / "argparse.py").exists() for folder in folders) and any(
        (folder / "pytest").exists() for folder in folders
    )
