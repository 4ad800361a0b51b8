"""A frozen encoder reads each sentence once: its vectors of the whole text, before any head, on disk.

    <directory>/<fingerprint>/000000.npy ...    float16 [rows, d_s], in the shards' order, each with its checksum

Ranks take blocks in turn. What is there and valid is not computed again, whatever the number of ranks; the fingerprint is of
the weights and of the text, so that nothing else's vectors are taken for these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distill.run.collectives import barrier, rank, world_size
from distill.run.recorded_array import is_saved, save_array
from distill.run.stopping import CheckStop, never
from distill.shards import ShardReader, fingerprint
from distill.student import Student
from distill.student.student import PooledVectors

BLOCK = 4096
MAX_OPEN = 64  # each takes a file descriptor


class Encoded:
    """The vectors of blocks of rows, at most MAX_OPEN of them open; what the loader reads instead of tokens.

    open_block: number of a block -> its vectors, float16 [rows, d_s].
    """

    def __init__(self, open_block: Callable[[int], np.ndarray]) -> None:
        self._block = lru_cache(MAX_OPEN)(open_block)

    @cached_property
    def width(self) -> int:
        return int(self._block(0).shape[1])

    def read(self, rows: np.ndarray) -> list[np.ndarray]:
        """float16 [d_s] of each of rows [n]; as tokens have, an input has a length."""
        vectors = np.empty((len(rows), self.width), dtype=np.float16)
        numbers, within = np.divmod(rows, BLOCK)
        for number in np.unique(numbers):
            here = numbers == number
            vectors[here] = self._block(int(number))[within[here]]
        return list(vectors)

    def pad(self, read: list[np.ndarray]) -> PooledVectors:
        """[n, d_s] float32, the encoder's vectors of the rows."""
        vectors = np.stack(read) if read else np.ones((1, self.width), dtype=np.float16)
        return PooledVectors(torch.from_numpy(vectors.astype(np.float32)))


def encode_all(
    student: Student, reader: ShardReader, directory: Path, amp: torch.dtype | None, check_stop: CheckStop = never
) -> Encoded:
    """All vectors of a student without a head; a collective. Raises ValueError if one is beyond float16."""
    assert student.head is None
    of = {
        "weights": _digest(student),
        "pooling": student.pooling,
        "max_length": student.max_length,
        "prompts": [student.prompt(role) for role in (None, "query", "document")],
        "text": [reader.manifest.text_fingerprint, len(reader)],
        "amp": str(amp),
    }
    folder = directory / fingerprint(of)[:16]
    paths = [folder / f"{number:06d}.npy" for number in range(-(-len(reader) // BLOCK))]
    folder.mkdir(parents=True, exist_ok=True)
    device = next(student.parameters()).device
    quiet = None if rank() == 0 else True
    for first in tqdm(range(0, len(paths), world_size()), "encode once", unit=f"x {BLOCK * world_size()}", disable=quiet):
        number = first + rank()
        if number < len(paths) and not is_saved(paths[number]):
            rows = np.arange(number * BLOCK, min((number + 1) * BLOCK, len(reader)))
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                vectors = student.encode(reader.texts(rows), normalize=False, roles=reader.roles(rows)).astype(np.float16)
            if not np.isfinite(vectors).all():
                raise ValueError("the frozen encoder's vectors are beyond float16: use hpd.freeze_encoder=false")
            save_array(paths[number], vectors)
        barrier()  # so that no rank waits longer than for a block
        check_stop()
    return Encoded(lambda number: np.load(paths[number], mmap_mode="r", allow_pickle=False))


def _digest(student: Student) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
