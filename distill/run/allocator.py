"""glibc's allocator settings: freed memory is kept for the next tensor."""

from __future__ import annotations

import os
import sys

NAME = "GLIBC_TUNABLES"
KEEPING = {
    "mmap_max": 0,  # otherwise tensors of more than 32 MB are mapped and faulted in at each allocation
    "trim_threshold": 2**40,
    "arena_max": 1,  # memory freed by gloo's threads is available to all threads
    "hugetlb": 1,  # requests 2 MB pages, if the kernel allows it
}
KEPT = ":".join(f"glibc.malloc.{name}={value}" for name, value in KEEPING.items())


def keep_freed_memory() -> None:
    """Restarts this process once with glibc settings that keep freed memory for the next tensor; without glibc, does nothing.

    On a CPU, page faults of a tensor of a few megabytes take as long as its arithmetic, and those of a 50 MB gradient longer.
    Measured on a MiniLM student of 3 layers in bf16, two ranks: 10 to 20% more texts per second. glibc reads its settings only
    when a process starts, hence the restart. A GLIBC_TUNABLES set by the user is respected, and child processes inherit ours.
    """
    if NAME in os.environ or not _is_glibc():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {NAME: KEPT})


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
