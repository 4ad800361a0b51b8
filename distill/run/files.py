"""Files that are complete or absent: written under a temporary name, flushed, then renamed. JSON carries its own checksum."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from distill.run import liveness

logger = logging.getLogger(__name__)
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_LFS_BEGIN = b"version https://git-lfs.github.com/spec/v1"
LFS_POINTER = "is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned"


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends without an error, and is deleted otherwise.

    Concurrent writers of one path write to different temporary files; the last rename wins, and each file is complete. Another
    process may rename the folder as soon as `path` exists, so it is flushed through a descriptor that was opened before.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    part = temporary_name(path)
    try:
        with naming(path), part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        os.fsync(folder)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an error of the operating system that names no file names `path`, whoever raised it.

    Libraries written in Rust (safetensors, tokenizers) raise errors of their own that end in "(os error 28)".
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (found := _OF_RUST.search(str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other call returns, and by which `sweep` knows who writes it."""
    return path.with_name(f".{path.name.lstrip('.')}.{liveness.label()}-{secrets.token_hex(4)}.part")


def sweep(directory: Path, *, older_than: float = 3600.0) -> None:
    """Deletes the temporary files below a folder whose writer was killed.

    Those are of processes that ran on this machine and are gone; of others, what was not written to for `older_than` seconds.
    """
    for folder, _, names in os.walk(directory):
        for part in (Path(folder, name) for name in names if name.startswith(".") and name.endswith(".part")):
            with suppress(OSError):  # published or swept by another process in between, or another user's
                writer = part.name.removesuffix(".part").rpartition(".")[2].rpartition("-")[0]
                if liveness.has_ended(writer) or time.time() - part.stat().st_mtime > older_than:
                    part.unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Publishes `value` as indented UTF-8 JSON with sorted keys and its own checksum, by which `read_json` verifies it."""
    with publish(path) as file:
        file.write(seal(value, indent=1))


def seal(value: dict[str, Any], *, indent: int | None = None) -> bytes:
    """`value` as JSON with its sha256 under the key "self", so that any changed byte is detected."""
    value = json.loads(json.dumps(value))  # keys that are numbers become strings, which sort differently
    digest = hashlib.sha256(canonical_json(value, allow_nan=True)).hexdigest()
    return canonical_json({**value, "self": digest}, indent, allow_nan=True)


def unseal(raw: bytes, *, indent: int | None = None) -> dict[str, Any]:
    """The argument of `seal`. Raises ValueError if a byte differs from what `seal` wrote."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    value.pop("self", None)
    if seal(value, indent=indent) != raw:
        raise ValueError("it was changed after it was written (its own sha256 does not fit)")
    return value


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends `value` to a .jsonl file, with its own checksum."""
    with naming(path), path.open("ab") as file:
        file.write(seal(value) + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of `append_line`; [] if there is none. A line that is damaged is left out, with a warning.

    Lines without a checksum were written by an earlier version of this program.
    """
    found, raw = [], path.read_bytes() if path.exists() else b""
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            value = json.loads(line)
            found.append(value if isinstance(value, dict) and value and "self" not in value else unseal(line))
        except ValueError as error:
            logger.warning("%s, line %d, is damaged and left out: %s", path, number, error)
    return found


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


def canonical_json(value: dict[str, Any], indent: int | None = None, *, allow_nan: bool = False) -> bytes:
    """UTF-8 JSON with sorted keys. Raises ValueError for NaN and infinities, unless `allow_nan`."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=allow_nan)
    return text.encode()


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
    """The object in a file of `write_json`; None if there is no such file.

    One that is damaged is set aside, with a warning, and None is returned: whatever it recorded is made again. One without a
    checksum was written by an earlier version of this program, and is read as it is.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = json.loads(raw)
        if isinstance(value, dict) and value and "self" not in value:
            return value
        return unseal(raw, indent=1)
    except ValueError as error:
        set_aside(path, str(error))
        return None


def set_aside(path: Path, reason: str) -> None:
    """Renames a damaged file or folder to *.damaged, with a warning that gives the reason."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    with suppress(FileNotFoundError):  # another process has done it
        path.replace(aside)
    logger.warning("%s is damaged (%s): it is made again, and is now %s", path, reason, aside.name)


class DigestCache:
    """Cached sha256 of a user's files: a JSON file of path -> size, mtime_ns, ctime_ns, inode and digest.

    Several processes may share the file; each writes its own entries, and the last write wins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = read_json(path) or {}

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
