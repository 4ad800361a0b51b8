"""Two million sentences take no more memory than one million: nothing holds the text, its hashes or its vectors whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import sentences
from reference_times import hang_limit

pytestmark = pytest.mark.slow
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from distill.config import load_config
from distill.teacher.precompute import encode_missing, finish_set, prepare
from distill.teacher.timing import Timing


class Fake:
    "Vectors that cost nothing: of the sentence's length."

    def read(self, sentences, numbers):
        return np.array([len(sentence) for sentence in sentences])

    def encode(self, read, tick):
        angles = read[:, None] * np.arange(1, 33)
        vectors = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / 32**0.5
        tick(len(read))
        return vectors.astype(np.float16)


config = load_config(sys.argv[1])
text = prepare(config)
identity = {"model": "fake", "precision": "fp32"}
timing = encode_missing(config, text, Fake(), identity)
assert finish_set(config, text, identity, timing)
lines = Path("/proc/self/status").read_text().splitlines()
print(text["counts"]["kept"], next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024)
"""


def peak_megabytes(folder, lines, count):
    """Of a precompute of `count` distinct sentences, those of `lines` with suffixes."""
    folder.mkdir()
    with (folder / "text.txt").open("w") as file:
        for number in range(count):
            file.write(f"{lines[number % len(lines)]} ({number // len(lines)})\n")
    (folder / "run.yaml").write_text(
        f"name: big\nruns_dir: {folder}\ntext: {{sources: [{{type: file, path: {folder / 'text.txt'}}}]}}\n"
        "teacher: {model: fake/teacher}\nstudent: {init: fake/student}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder / "run.yaml"], capture_output=True, text=True, timeout=4 * hang_limit()
    )
    assert done.returncode == 0, done.stderr
    kept, peak = map(int, done.stdout.split())
    assert kept > 0.97 * count
    return peak


def test_memory_does_not_grow_with_the_text(tmp_path, request):
    try:
        data = request.getfixturevalue("data")
        import gzip

        with gzip.open(data / "unlabelled/wiki1m_en.txt.gz", "rt") as file:
            lines = [line.rstrip("\n") for line in file]
    except pytest.skip.Exception:
        lines = sentences(100_000)
    one, two = (peak_megabytes(tmp_path / str(count), lines, count) for count in (1_000_000, 2_000_000))
    print(f"peak resident memory: {one} MB for one million sentences, {two} MB for two")
    assert two < 500
    assert two < one * 1.05 + 10
