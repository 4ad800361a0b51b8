"""python -m distill.shards verify|info|repair DIR: verifies a shard set, describes it, deletes damaged shards.

Exits with 0 only if every byte is as it was written. DIR/held_out is included if it exists.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distill.shards.format import HELD_OUT, Manifest, ShardError
from distill.shards.reader import ShardReader
from distill.shards.repair import repair
from distill.shards.verify import verify_all

CHUNK_ROWS = 1 << 16


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.shards", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["verify", "info", "repair"])
    parser.add_argument("directory", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    command = {"verify": _verify, "info": _info, "repair": _repair}[options.command]
    directories = [options.directory]
    if (options.directory / HELD_OUT).is_dir():
        directories.append(options.directory / HELD_OUT)
    try:
        return 0 if all([command(directory) for directory in directories]) else 1
    except (ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _verify(directory: Path) -> bool:
    with _bar(directory) as bar:
        problems = verify_all(directory, progress=bar.update)
    for problem in problems:
        print(f"{directory}: {problem}")
    if not problems:
        manifest = Manifest.load(directory)
        print(f"{directory}: {len(manifest.shards)} shards, {manifest.count} texts, every byte as it was written")
    return not problems


def _repair(directory: Path) -> bool:
    with _bar(directory) as bar:
        actions, whole = repair(directory, progress=bar.update)
    for action in actions:
        print(f"{directory}: {action}")
    if whole:
        print(f"{directory}: whole")
    return whole


def _info(directory: Path) -> bool:
    reader = ShardReader(directory, verify=False)
    manifest = reader.manifest
    stored = sum(entry.bytes for entry in manifest.shards)
    blocks = [np.arange(start, min(start + CHUNK_ROWS, len(reader))) for start in range(0, len(reader), CHUNK_ROWS)]
    text = sum(
        int(reader.lengths(rows, np.full(len(rows), column)).sum())
        for rows in tqdm(blocks, disable=None, leave=False)
        for column in range(reader.num_columns)
    )
    raw = text + 2 * manifest.dim * manifest.count
    lines = {
        "texts": f"{manifest.count:,}",
        "shards": f"{len(manifest.shards):,} of at most {manifest.rows:,} texts, in blocks of {manifest.block_rows:,}",
        "vectors": f"{manifest.dim} x {manifest.dtype}",
        "bytes": f"{stored:,}, {stored / manifest.count:.1f} per text, {stored / raw:.4f} x raw text and vectors",
        "teacher": ", ".join(f"{key}={value}" for key, value in sorted(manifest.teacher.items()) if key != "probes"),  # vectors
        "teacher fingerprint": manifest.teacher_fingerprint,
        "text fingerprint": manifest.text_fingerprint,
    }
    print(directory)
    for name, value in lines.items():
        print(f"  {name:<20} {value}")
    return True


def _bar(directory: Path) -> tqdm:
    total = sum(path.stat().st_size for path in directory.glob("*.tar"))
    return tqdm(total=total, unit="B", unit_scale=True, desc=str(directory), disable=None, leave=False)


if __name__ == "__main__":
    sys.exit(main())
