"""Claims: which task makes which shard.

A claim is a file `.000007.claim` beside the missing shard, which only one task can create and which that task, its owner,
rewrites every BEAT seconds. The claims of a killed task are void: at once for tasks on the same machine, for others once the
file has not changed for TIMEOUT seconds of the observer's clock. Claims save work and are not needed for correctness: if two
tasks make the same shard, each writes the same bytes under its own temporary name, and the last rename wins.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from distill.run.files import naming, temporary_name
from distill.run.liveness import Heartbeat, is_here, state_of, this_process

logger = logging.getLogger(__name__)
CONTENT_BYTES = 512
BEAT = 10.0
TIMEOUT = 150.0  # a network file system may show a file as it was a minute ago


class Claims:
    """The claims of one task, in any number of folders. A context manager: leaving it releases all of them."""

    def __init__(self) -> None:
        self._owner = this_process()
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}  # claims of others: content, since when, has it changed before
        self._stopped = threading.Event()
        self._heartbeat = Heartbeat(self._beat, BEAT)

    def __enter__(self) -> Claims:
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._heartbeat.close()
        for path in list(self._held):
            self.release(path)

    def stop(self) -> None:
        """Ends `claimed`: no further shard is claimed."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def take(self, path: Path) -> bool:
        """Creates the claim file `path`, unless another task's claim holds; returns whether it is ours. Never waits."""
        while True:
            try:
                with self._lock:
                    self._create(path)
                    self._held.add(path)
            except FileExistsError:
                if self.state(path) in ("live", "unknown"):
                    return False
                path.unlink(missing_ok=True)
            else:
                return True

    def release(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)
            path.unlink(missing_ok=True)

    def state(self, path: Path) -> Literal["free", "live", "unknown", "void"]:
        """The state of another task's claim. live: its owner runs on this machine, or has rewritten it between two calls."""
        found = _read(path)
        if found is None:
            return "free"
        owner = _parse(found)
        if owner is not None and is_here(owner):
            return "live" if state_of(owner) else "void"
        now = time.monotonic()
        content, since, beating = self._seen.get(path, (None, now, False))
        if content != found:
            since, beating = now, content is not None
            self._seen[path] = found, since, beating
        if now - since > TIMEOUT:
            return "void"
        return "live" if beating and now - since <= 3 * BEAT else "unknown"

    def _create(self, path: Path) -> None:
        """Creates a claim with its content: one that is seen names its owner. Raises FileExistsError if there is one."""
        part = temporary_name(path)
        try:
            with naming(part):
                part.write_bytes(self._content())
            os.link(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beat": time.monotonic_ns()}).ljust(CONTENT_BYTES).encode()

    def _beat(self) -> None:
        with self._lock:
            for path in self._held:
                with suppress(OSError):  # the work itself reports a full disk or a directory that was removed
                    file = os.open(path, os.O_WRONLY)
                    try:
                        os.pwrite(file, self._content(), 0)  # in place: no other task sees a part of it
                    finally:
                        os.close(file)


def claim_of(folder: Path, shard: int) -> Path:
    return folder / f".{shard:06d}.claim"


def claimed(
    claims: Claims,
    missing: Callable[[], list[tuple[Path, int]]],
    *,
    poll: float = 2.0,
    while_waiting: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Path, int, Path]]:
    """Yields (folder, shard, claim) of each missing shard once its claim is held; the caller releases the claim.

    `missing()` lists what is missing now. Ends when nothing is, or when live tasks have claimed all of it. `while_waiting` is
    called every `poll` seconds while it is not known whether the owners of the last claims live.
    """
    mine: set[tuple[Path, int]] = set()
    is_waiting = False
    while not claims.stopped and (left := [item for item in missing() if item not in mine]):
        states = []
        for folder, index in left:
            claim = claim_of(folder, index)
            if claims.take(claim):
                if (folder, index) not in missing():  # made by another task in the meantime
                    claims.release(claim)
                    break
                mine.add((folder, index))
                yield folder, index, claim
                break
            states.append(claims.state(claim))
        else:
            if all(state == "live" for state in states):
                return
            if not is_waiting:
                logger.info("precompute: waiting for %d claims of other machines, up to %.0f s", len(left), TIMEOUT)
            is_waiting = True
            while_waiting()
            time.sleep(poll)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(found: bytes | None) -> dict[str, Any] | None:
    try:
        owner = json.loads(found or b"")
    except ValueError:  # just created, or cut off
        return None
    return owner if isinstance(owner, dict) else None
