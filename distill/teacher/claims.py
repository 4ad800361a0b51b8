"""Who makes which shard: claims beside the missing shards, good for as long as their owner's heart beats.

A claim is a file `.000007.claim`, which only one task can create and which its owner rewrites every BEAT seconds. A task that
was killed leaves claims behind: on the machine where it ran they are void at once, elsewhere when they have not changed for
TIMEOUT seconds of the observer's own clock. Claims save work, they do not guard the result: if two tasks make one shard after
all, they write the same bytes under a temporary name each, and the last rename wins.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from distill.process import is_here, state_of, this_process

BEAT = 10.0
TIMEOUT = 150.0  # file systems over a network may show a file as it was a minute ago


class Claims:
    """The claims of one task, in any number of folders. A context manager: leaving it gives all of them up."""

    def __init__(self) -> None:
        self._owner = this_process()
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}  # a claim of others: its content, since when, had it changed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._thread.join()
        for path in list(self._held):
            self.give_up(path)

    def stop(self) -> None:
        """Nothing more is dealt out under these claims."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def take(self, path: Path) -> bool:
        """Whether this task may work on what the claim file `path` stands for. Never waits."""
        while True:
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if self.state(path) in ("live", "unknown"):
                    return False
                path.unlink(missing_ok=True)
                continue
            with self._lock, os.fdopen(descriptor, "wb") as file:
                file.write(self._pulse())
                self._held.add(path)
            return True

    def give_up(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)
            path.unlink(missing_ok=True)

    def state(self, path: Path) -> Literal["free", "live", "unknown", "void"]:
        """Of a claim of others. live: its owner runs on this machine, or its heart has beaten since an earlier look."""
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

    def _pulse(self) -> bytes:
        return json.dumps({**self._owner, "beat": time.monotonic_ns()}).encode()

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT):
            with self._lock:
                for path in self._held:
                    try:
                        path.write_bytes(self._pulse())
                    except OSError:  # a full disk or a directory that was removed is reported by the work itself
                        continue


def dealt(
    claims: Claims, missing: Callable[[], list[tuple[Path, int]]], *, poll: float = 2.0
) -> Iterator[tuple[Path, int, Path]]:
    """Yields (folder, shard, claim) of missing shards, each once its claim is held; the receiver gives the claim up.

    `missing()` lists what is missing now. Ends when nothing is, or when all that is missing is in the hands of live tasks.
    """
    mine: set[tuple[Path, int]] = set()
    while not claims.stopped and (left := [item for item in missing() if item not in mine]):
        states = []
        for folder, index in left:
            claim = folder / f".{index:06d}.claim"
            if claims.take(claim):
                if (folder, index) not in missing():  # made by another task since we looked
                    claims.give_up(claim)
                    break
                mine.add((folder, index))
                yield folder, index, claim
                break
            states.append(claims.state(claim))
        else:
            if all(state == "live" for state in states):
                return
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
