"""Calls of this process that change files under one folder, seen before each is made: Python's audit events, and os.fsync."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR
# event -> where its arguments have the path, and the folder's descriptor that it is relative to
EVENTS = {
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.rename": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.link": (1, 3),
    "os.truncate": (0, None),
    "os.chmod": (0, 2),
}


@dataclass(frozen=True)
class FileCall:
    """A call: its name and the path, relative to the folder. file: the descriptor of a file that is flushed, else None."""

    name: str
    path: str
    file: int | None = None

    @property
    def kind(self) -> str:
        """The name and the path without its numbers: what is the same for all shards, steps and temporary files."""
        path = re.sub(r"[0-9a-f]{8}-[0-9]+-[0-9]+-[0-9a-f]{8}\.part$", "WRITER.part", self.path)
        return f"{self.name} {re.sub('[0-9]+', 'N', re.sub(r'[0-9a-f]{6,}', 'N', path))}"


def follow(root: Path, on_call: Callable[[FileCall], object]) -> None:
    """From now on on_call is called before each call of this process, in any thread, that changes something under `root`."""
    fsync = os.fsync

    def report(name: str, path: Any, folder: Any = None, file: int | None = None) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):  # a descriptor
            return
        whole = Path(os.fsdecode(path))
        if isinstance(folder, int) and folder >= 0:
            whole = Path(f"/proc/self/fd/{folder}").readlink() / whole
        if whole.is_relative_to(root):
            on_call(FileCall(name, str(whole.relative_to(root)), file))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and not (event == "open" and not arguments[2] & WRITES):
            path, folder = EVENTS[event]
            report(event.removeprefix("os."), arguments[path], arguments[folder] if folder is not None else None)

    def audited_fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        report("fsync", Path(f"/proc/self/fd/{number}").readlink(), file=number)
        fsync(file)

    os.fsync = audited_fsync
    sys.addaudithook(audit)


def record(root: Path, out: Path) -> Callable[[], None]:
    """What makes a process append the kind of each of its calls to the file `out`."""

    def begin() -> None:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        follow(root, lambda call: os.write(file, f"{call.kind}\n".encode()))

    return begin


def kill_at(root: Path, kind: str, number: int) -> Callable[[], None]:
    """What makes a process kill itself before its call `number`, from 1, of this kind.

    A file that is about to be flushed is cut to half before: no part of it was certain to be on disk.
    """

    def begin() -> None:
        left = number

        def count(call: FileCall) -> None:
            nonlocal left
            if call.kind != kind:
                return
            left -= 1
            if left == 0:
                path = root / call.path
                if call.file is not None and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        follow(root, count)

    return begin
