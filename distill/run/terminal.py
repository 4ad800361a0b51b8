"""Log messages on a terminal that also shows progress bars."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class TerminalHandler(logging.Handler):
    """Writes messages to the current sys.stderr, above a progress bar if there is one; warnings and errors say so."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)
