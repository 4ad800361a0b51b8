"""How fast state is verified: a set of shards when a stage opens it, and a file of a student or a checkpoint.

    python tests/bench/verify.py --work /tmp/bench [--gb 5]

Prints GB/s of both, of files in the page cache, and from them the seconds for 1 GB of student and 100 GB of shards.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from distill.corpus import text_hash
from distill.run.files import sha256_of
from distill.shards import fingerprint, finish, write_shard
from distill.training.shard_verification import open_verified

DIM, ROWS = 512, 65_536
TEACHER = {"model": "bench"}


def make(folder: Path, num_shards: int) -> None:
    """Shards of random unit vectors, the same in each, and texts of their own."""
    folder.mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    same = {"block_rows": 1024, "teacher_fingerprint": fingerprint(TEACHER)}
    for index in range(num_shards):
        texts = [f"text {row} of shard {index}" for row in range(ROWS)]
        hashes = np.array([text_hash(text) for text in texts], dtype=np.int64)
        write_shard(folder, index, texts, hashes, vectors, text_fingerprint=str(index), **same)
    numbers = [str(index) for index in range(num_shards)]
    finish(folder, teacher=TEACHER, text_fingerprint="bench", text_fingerprints=numbers, rows=ROWS, **same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the shards, which are kept")
    parser.add_argument("--gb", type=float, default=5.0)
    options = parser.parse_args()
    folder = options.work / f"verify-{options.gb:g}"
    if not folder.exists():
        make(folder, round(options.gb * 1e9 / (ROWS * DIM * 2)))
    tars = sorted(folder.glob("*.tar"))
    gigabytes = sum(path.stat().st_size for path in tars) / 1e9
    rates: dict[str, float] = {}
    for what in ("files", "shards"):
        started = time.perf_counter()
        if what == "files":
            for path in tars:
                sha256_of(path)
        else:
            open_verified(folder, torch.device("cpu"))
        rates[what] = gigabytes / (time.perf_counter() - started)
    found = {
        "gb": round(gigabytes, 2),
        "gb_per_second": {what: round(rate, 2) for what, rate in rates.items()},
        "seconds": {"1 GB of student": round(1 / rates["files"], 2), "100 GB of shards": round(100 / rates["shards"], 1)},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
