"""Reading shards in shuffled order, compared with per-sample WebDataset tars and a memory-mapped array; and bytes per text.

    python tests/bench/shards.py --text DATA/unlabelled/wiki1m_en.txt.gz --sentences 200000 --dim 384

All three hold the same texts and vectors and are in the page cache; one process, one thread. The per-sample tars are read in
the usual way: shards in random order, a shuffle buffer, the library's decoding.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset

from distill.corpus.text import text_hash
from distill.shards import ShardReader, fingerprint, finish, write_shard

ROWS, BATCH = 50_000, 1024
TEACHER = {"model": "bench"}


def make(folder: Path, texts: list[str], vectors: np.ndarray) -> None:
    """The three sets: folder/ours, folder/samples, folder/array.npy."""
    ours, samples = folder / "ours", folder / "samples"
    ours.mkdir()
    samples.mkdir()
    for number, start in enumerate(range(0, len(texts), ROWS)):
        rows = slice(start, start + ROWS)
        hashes = np.array([text_hash(text) for text in texts[rows]], dtype=np.int64)
        write_shard(
            ours,
            number,
            texts[rows],
            hashes,
            vectors[rows],
            block_rows=1024,
            teacher_fingerprint=fingerprint(TEACHER),
            text_fingerprint=str(number),
        )
        with webdataset.TarWriter(str(samples / f"{number:06d}.tar")) as tar:
            for row, text in enumerate(texts[rows], start=start):
                about = {"hash": int(hashes[row - start])}
                tar.write({"__key__": f"{row:09d}", "txt": text, "embedding.npy": vectors[row], "json": about})
    count = -(-len(texts) // ROWS)
    finish(
        ours,
        teacher=TEACHER,
        teacher_fingerprint=fingerprint(TEACHER),
        text_fingerprint="bench",
        text_fingerprints=[str(number) for number in range(count)],
        rows=ROWS,
        block_rows=1024,
    )
    np.save(folder / "array.npy", vectors)


def rate(batches, seconds: float) -> float:
    """Texts per second after the first batch; batches: the number of texts of each."""
    batches = iter(batches)
    next(batches)
    read, started = 0, time.perf_counter()
    for count in batches:
        read += count
        if time.perf_counter() - started > seconds:
            break
    return read / (time.perf_counter() - started)


def shuffled(total: int):
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(total)
        yield from (order[start : start + BATCH] for start in range(0, total - BATCH, BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a .txt.gz with a text per line")
    parser.add_argument("--sentences", dest="num_texts", type=int, default=200_000, help="texts taken of --text")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    with gzip.open(options.text, "rt", encoding="utf-8") as file:
        texts = [line.rstrip("\n") for line in itertools.islice(file, options.num_texts)]
    vectors = np.random.default_rng(0).normal(size=(len(texts), options.dim)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, texts, vectors)
        reader = ShardReader(folder / "ours")
        reader.vectors(np.arange(0, len(reader), 97))  # opens and verifies every shard
        array = np.load(folder / "array.npy", mmap_mode="r")
        tars = sorted(map(str, (folder / "samples").glob("*.tar")))
        samples = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).decode()
        samples = samples.to_tuple("txt", "embedding.npy").repeat()
        ours, peer = shuffled(len(reader)), (len(batch[0]) for batch in samples.batched(BATCH))
        measured = {
            "shards, vectors and texts": (min(len(reader.texts(i)), len(reader.vectors(i))) for i in ours),
            "shards, vectors": (len(reader.vectors(i)) for i in ours),
            "per-sample WebDataset": peer,
            "memory-mapped array, vectors": (len(array[i]) for i in ours),
        }
        rates = {name: rate(batches, options.seconds) for name, batches in measured.items()}
        raw = sum(len(text.encode()) for text in texts) + vectors.nbytes
        sizes = {
            "raw text and vectors": raw,
            "shards": sum(path.stat().st_size for path in (folder / "ours").glob("*.tar")),
            "per-sample WebDataset": sum(path.stat().st_size for path in (folder / "samples").glob("*.tar")),
        }
    result = {
        "texts": len(texts),
        "dim": options.dim,
        "texts_per_second": {name: round(value) for name, value in rates.items()},
        "ratio_to_per_sample": round(rates["shards, vectors and texts"] / rates["per-sample WebDataset"], 1),
        "bytes_per_text": {name: round(size / len(texts), 1) for name, size in sizes.items()},
        "overhead": {name: round(size / raw, 4) for name, size in sizes.items()},
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
