"""A wish to stop: at the same step on every rank, after a checkpoint; nothing here installs a signal handler.

A rank's trainer asks its StopRequest once a step and adds the answer to the sums that the ranks reduce anyway, so all of them
learn of a wish at the same step, whoever was told.
"""

from __future__ import annotations

import threading
from pathlib import Path


class Stopped(Exception):
    """A stage ended before its last step because it was asked to, after its checkpoint; raised on all ranks."""


class StopRequest:
    """Whether somebody wants this process to stop: through `ask`, from any thread, or by making `file`.

    `file` is for rank 0 alone: ranks that looked for themselves would see it at different steps, or not at all.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set() or (self.file is not None and self.file.exists())

    def obeyed(self) -> None:
        """Removes the file, so that the next start does not stop at once."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
