"""Cooperative stop requests: all ranks stop after the same step, with a checkpoint. No signal handler is installed here.

The trainer of each rank reads its StopRequest once a step and adds it to the sums that the ranks reduce anyway, so that all of
them see a request at the same step, whichever rank received it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


class Stopped(Exception):
    """A stage ended before its last step because it was asked to, and has kept what it has done; raised on all ranks."""


CheckStop = Callable[[], None]
"""Raises Stopped on all ranks if one of them was asked to stop; all of them call it."""


def never() -> None:
    """The check of work that is not stopped."""


class StopRequest:
    """Whether this process was asked to stop: by `request`, from any thread, or by creating `file`.

    `file` is for rank 0 alone: ranks that looked for themselves would see it at different steps, or not at all.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._requested = threading.Event()

    def request(self) -> None:
        self._requested.set()

    @property
    def is_requested(self) -> bool:
        return self._requested.is_set() or (self.file is not None and self.file.exists())

    def wait(self, seconds: float) -> bool:
        """Waits for a stop, at most for these seconds; returns whether one is requested."""
        self._requested.wait(seconds)
        return self.is_requested

    def pass_on(self) -> None:
        """Creates the file, for the ranks that this process has started."""
        assert self.file is not None
        self.file.write_text(f"written by process {os.getpid()}, which was asked to stop\n")

    def remove_left_over(self, since: float) -> bool:
        """Removes a file that was there before this start, `since` (in time.time()), or was left by a process that passed a
        stop on and was killed; returns whether there was one. One that a user creates from then on stays."""
        try:
            assert self.file is not None
            found = self.file.stat()
        except FileNotFoundError:
            return False
        is_left_over = found.st_size > 0 or found.st_mtime < since
        if is_left_over:
            self.clear()
        return is_left_over

    def clear(self) -> None:
        """Removes the file, so that the next start does not stop at once."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
