"""Files that are complete or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_LFS_BEGIN = b"version https://git-lfs.github.com/spec/v1"
LFS_POINTER = "is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned"


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends without an error, and is deleted otherwise.

    Concurrent writers of one path write to different temporary files; the last rename wins, and each file is complete. Another
    process may rename the folder as soon as `path` exists, so it is flushed through a descriptor that was opened before.
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
    """Deletes temporary files of `publish` whose writer was killed: those not written to for `older_than` seconds."""
    for part in directory.glob(".*.part"):
        with suppress(FileNotFoundError):  # published or swept by another process in between
            if time.time() - part.stat().st_mtime > older_than:
                part.unlink()


def write_json(path: Path, value: Any) -> None:
    """Publishes `value` as indented UTF-8 JSON with sorted keys."""
    with publish(path) as file:
        file.write(json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n")


def fingerprint(value: dict[str, Any]) -> str:
    """The hex sha256 of `value` as canonical JSON: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git leaves of a large file where git-lfs has not downloaded it."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_BEGIN)) == _LFS_BEGIN
    except OSError:
        return False


def canonical_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    """UTF-8 JSON with sorted keys and no NaN."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False).encode()


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


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. Raises ValueError naming a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}); restore it, or delete what it describes") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object; restore it, or delete what it describes")
    return value


class DigestCache:
    """Cached sha256 of a user's files: a JSON file of path -> size, mtime_ns, ctime_ns, inode and digest.

    Several processes may share the file; each writes its own entries, and the last write wins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = read_json(path) or {}
        except ValueError:
            self._known = {}

    def sha256(self, path: Path) -> str:
        """The hex sha256 of the file's content; from the cache where the file has not changed since."""
        stat = path.stat()
        key, signature = str(path.absolute()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(key)
        if known is None or known[:-1] != signature:
            known = self._known[key] = [*signature, sha256_of(path)]
            with suppress(OSError):  # a cache that cannot be written costs time, not correctness
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, self._known)
        return str(known[-1])
