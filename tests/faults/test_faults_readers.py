"""Single bits flipped in every kind of file of a run: the product's own reader finds each, or reads the same as before."""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import damage, files_by_kind

from distill.config import load_run
from distill.corpus.chunks import read_listed_chunk
from distill.corpus.prepare import held_out_sources
from distill.export.folder import exports_digests
from distill.run.config import ConfigError
from distill.run.files import read_json, read_lines
from distill.run.recorded_array import is_saved
from distill.run.stage import stage_fingerprint
from distill.shards import Manifest, ShardError, ShardReader, verify_all
from distill.student.fingerprint import files_fingerprint, student_fingerprint
from distill.training.checkpoint import _read as read_checkpoint

DAMAGED = "damaged"
# read by nothing but a user's eyes, or by TensorBoard, whose events have checksums of their own
OUTPUT = r"README\.md$|table\.txt$|report\.html$|^logs/|^tensorboard/"


def text(path: Path) -> Any:
    manifest = read_json(path.with_name("manifest.json")) or {}
    entries = [*manifest["chunks"], manifest["held_out"]]
    return [read_listed_chunk(path.parent, entry)[0] for entry in entries if path.stem.startswith(entry["name"])]


def shards(path: Path) -> Any:
    reader = ShardReader(path.parent)
    rows = np.arange(len(reader))
    return [reader.texts(rows), reader.vectors(rows).tobytes()]


def checkpoint(path: Path) -> Any:
    folder = next(each for each in path.parents if each.name.startswith("step-"))
    described, problem = read_checkpoint(folder)
    return described if problem is None else DAMAGED


def student(path: Path) -> Any:
    folder = next(each for each in path.parents if each.name == "student")
    return DAMAGED if student_fingerprint(folder) != stage_fingerprint(folder.parent) else "as recorded"


def exports(path: Path) -> Any:
    directory = next(each for each in path.parents if each.name == "export")
    return DAMAGED if files_fingerprint(exports_digests(directory)) != stage_fingerprint(directory) else "as recorded"


READERS: dict[str, Callable[[Path], Any]] = {
    r"^config\.yaml$": lambda path: load_run(path.parent),
    r"\.jsonl$": read_lines,
    r"/checkpoints/": checkpoint,
    r"^[a-z]+/student/": student,
    r"^export/.*/": exports,
    r"^shards/.*tar$": shards,
    r"^shards/(held_out/)?manifest\.json$": lambda path: Manifest.load(path.parent),
    r"^shards/": lambda path: verify_all(path.parent) and DAMAGED,
    r"sources\.npy$": lambda path: held_out_sources(path.parent),
    r"^precompute/text/.*\.(txt|npy)$": text,
    r"\.npy$": lambda path: is_saved(path) or DAMAGED,
    r"\.json$": read_json,
}


def read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader finds in a file; DAMAGED if it says that the file, by its name, is not as it was written."""
    try:
        found = reader(path)
    except (ValueError, ShardError, ConfigError) as error:
        assert path.name in str(error) or path.stem in str(error), f"{path}: {error}"
        return DAMAGED
    return DAMAGED if found is None else found


def flip_bits(run: Path, tmp_path: Path, number: int) -> dict[str, tuple[int, int]]:
    """Kind of file -> how many of `number` flipped bits were found, and how many changed nothing of what is read."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    draw = random.Random(seed)
    copy = Path(shutil.copytree(run, tmp_path / run.name))
    table = {}
    for kind, paths in files_by_kind(copy).items():
        if re.search(OUTPUT, kind) or kind.endswith(".lock"):
            continue
        reader = next((each for pattern, each in READERS.items() if re.search(pattern, kind)), None)
        assert reader is not None, f"nothing is known to read {kind}"
        found = 0
        for _ in range(number):
            path = draw.choice(paths)
            content, before = path.read_bytes(), read(path, reader)
            damage(path, "flip", draw)
            after = read(path, reader)
            found += after == DAMAGED or (isinstance(after, list) and len(after) < len(before))
            assert before != DAMAGED and (after in (DAMAGED, before) or is_harmless(before, after)), f"{path}: {after}"
            path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)
            path.write_bytes(content)
        table[kind] = (found, number - found)
    return table


def is_harmless(before: Any, after: Any) -> bool:
    """Whether `after` is a log without its damaged line, or a record in which the checksum alone has another name."""
    if isinstance(before, list) and len(after) == len(before):
        return all(map(is_harmless, before, after))
    if isinstance(before, list):
        return len(after) == len(before) - 1 and all(line in before for line in after)
    return isinstance(before, dict) and all(after.get(key) == value for key, value in before.items())


@pytest.mark.parametrize("number", [5, pytest.param(200, marks=pytest.mark.soak)])
def test_a_flipped_bit_is_found_or_changes_nothing_of_what_is_read(finished, tmp_path, number, caplog):
    caplog.set_level(logging.CRITICAL)
    table = flip_bits(finished[1], tmp_path, number)
    for kind, (found, same) in table.items():
        print(f"{kind:55} found {found:4}, no influence {same:4}")
    kinds = {"precompute/text/N.txt", "shards/N.tar", "ckd/checkpoints/step-N/rank-N.safetensors", "finetune/triplets.npy"}
    assert kinds <= table.keys() and all(found == number for kind, (found, _) in table.items() if kind in kinds)
