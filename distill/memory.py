"""The process's own memory: what the allocator does with what tensors give back."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next tensor instead of giving it back page by page; False where it is not glibc.

    On a CPU, an activation of a few megabytes costs as much in page faults as in arithmetic. Measured with a MiniLM encoder in
    bf16: 8 to 13% more sentences a second.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 << 20) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
