"""Two million texts take no more memory than one million: the text, its hashes and its vectors are never in memory at once."""

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
from distill.config import load_config, stage_of
from distill.run.files import fingerprint
from distill.teacher.encode_missing import encode_missing


class Fake:
    "Cheap vectors: functions of the text's length."

    def read(self, chunk):
        return np.array([len(text) for text in chunk.texts])

    def encode(self, read, tick):
        angles = read[:, None] * np.arange(1, 33)
        vectors = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / 32**0.5
        tick(len(read))
        return vectors.astype(np.float16)


def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


imported = megabytes("VmRSS")
stage = stage_of(load_config(sys.argv[1]), "precompute")
text = stage.prepare()
identity = {"model": "fake", "precision": "fp32"}
sets, chunks = stage.shard_sets(text), stage.directory / "text"
timing = encode_missing(sets, chunks, Fake(), teacher_fingerprint=fingerprint(identity), block_rows=1024)
assert stage.finish_set(text, identity, timing)
print(text["counts"]["kept"], megabytes("VmHWM") - imported)
"""


def peak_megabytes(folder, lines, count):
    """Peak memory of a precompute of `count` distinct texts, `lines` with suffixes, beyond that of the imported modules."""
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


@pytest.mark.soak
def test_memory_does_not_grow_with_the_text(tmp_path, request):
    try:
        data = request.getfixturevalue("data")
        import gzip

        with gzip.open(data / "unlabelled/wiki1m_en.txt.gz", "rt") as file:
            lines = [line.rstrip("\n") for line in file]
    except pytest.skip.Exception:
        lines = sentences(100_000)
    one, two = (peak_megabytes(tmp_path / str(count), lines, count) for count in (1_000_000, 2_000_000))
    print(f"peak resident memory beyond the imports: {one} MB for one million texts, {two} MB for two")
    assert two < 300
    # the vectors of another million take 128 MB, the texts as much; the peak itself varies with how reading and writing overlap
    assert two < one + 60
