"""Files that are complete or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends well, and leaves nothing behind when it does not.

    Whoever races for the same path writes to a file of their own; the last rename wins, and each is whole. Once `path` is seen
    its folder may be given another name: what is still flushed is the folder, not its name.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        os.fsync(folder)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(folder)


def sweep(directory: Path, *, older_than: float = 3600.0) -> None:
    """Deletes the temporary files of `publish` whose writer was killed: those that nobody wrote to for so many seconds."""
    for part in directory.glob(".*.part"):
        if time.time() - part.stat().st_mtime > older_than:
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Publishes `value` as indented UTF-8 JSON with sorted keys."""
    with publish(path) as file:
        file.write(json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n")


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file or a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
