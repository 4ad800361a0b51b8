"""Cooperative stop requests: all ranks stop after the same step, with a checkpoint. No signal handler is installed here.

The trainer of each rank reads its StopRequest once a step and adds it to the sums that the ranks reduce anyway, so that all of
them see a request at the same step, whichever rank received it.
"""

from __future__ import annotations

import threading
from pathlib import Path


class Stopped(Exception):
    """A stage ended before its last step because it was asked to, after its checkpoint; raised on all ranks."""


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

    def clear(self) -> None:
        """Removes the file, so that the next start does not stop at once."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
