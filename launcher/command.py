"""What the command lines share: --config and overrides, exit codes, one-line errors, signals, logging to the terminal."""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

try:
    from distill.run.allocator import keep_freed_memory
    from distill.run.temporary import TemporaryError
    from distill.run.terminal import TerminalHandler
except ModuleNotFoundError as missing:
    print(
        f"error: {sys.executable} has no {missing.name}: run `bash launcher/install.sh` once, then `source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

if TYPE_CHECKING:
    import torch

    from distill.run.stopping import StopRequest

FIXABLE = (ValueError, OSError, FloatingPointError)  # reported in one line
# of an OSError that the user has to fix; others, of a network or a file system, may not come again
FINAL_ERRORS = {
    "ENOENT",
    "EACCES",
    "EPERM",
    "EROFS",
    "ENOSPC",
    "EDQUOT",
    "EFBIG",
    "EISDIR",
    "ENOTDIR",
    "ENAMETOOLONG",
    "EEXIST",
}
CONTINUES = "the same command continues from here"
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "davinci*", "dri/render*")

STARTED = time.time()
PARENT = "DISTILL_PARENT"  # id of the pipeline's process: the commands that it starts end with it
IN_PIPELINE = "DISTILL_IN_PIPELINE"  # set for the commands of a pipeline, on any node

USER_ERROR = 2  # the exit code of an error that the user has to fix, as its message says: final under Slurm
STOPPED = 75  # EX_TEMPFAIL: stopped on request, and the same command continues
INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Exit(Exception):
    """An exit whose reason was reported already, here or by another rank. Its argument is the exit code."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, SIGUSR1 or SIGUSR2, which end a command as Ctrl-C does, with STOPPED."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --config, --traceback and key=value overrides."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", required=True, metavar="FILE.yaml", help="the run's YAML, e.g. configs/quickstart.yaml")
    made.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, e.g. ckd.lr=1e-4 name=trial")
    return made


def path(text: str) -> Path:
    """The type of an argument that names a file or folder; a leading ~ is the home folder, which --out=~/x leaves to us."""
    return Path(text).expanduser()


def name(text: str) -> str:
    """The type of an argument that names a folder or something else, such as hub:OWNER/NAME."""
    return str(path(text)) if text.startswith("~") else text


def start(main: Callable[[], int]) -> NoReturn:
    """The `__main__` of every command line: prepares this process, runs main and exits with its code."""
    if PARENT in os.environ:
        end_with_parent(int(os.environ[PARENT]))
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows escapes where it lacks a character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    set_environment()
    keep_freed_memory()
    stop_on_signals()
    code = main()
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # it ends now; a handler that raises would end in a traceback of `atexit`
    if code in (0, STOPPED, INTERRUPTED):  # not after a failure: it would wait for ranks that may be gone
        leave_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_one_of_many_ranks():
        os._exit(code)
    sys.exit(code)


def leave_process_group() -> None:
    """Destroys torch's process group, if this process has joined one."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def set_environment() -> None:
    """Environment variables that libraries read when they are imported; those that are set already stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches come from a thread, ranks are processes
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not any(any(Path("/dev").glob(pattern)) for pattern in ACCELERATORS):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning in every process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # gloo prints a page for what it raises as well


def run(work: Callable[[], int | None], *, show_traceback: bool = False) -> int:
    """Runs `work`, prints its error and returns its exit code.

    That is its own; 2 with a one-line error for what a user has to fix, 1 for any other error, 75 if it was stopped, 130 on
    Ctrl-C.
    """
    log_to_terminal()
    threading.excepthook = report_thread
    try:
        return work() or 0
    except KeyboardInterrupt as stop:
        code = exit_code(stop)
        print(f"{_prefix()}{'stopped' if code == STOPPED else 'interrupted'}; {CONTINUES}", file=sys.stderr)
        return code
    except Exit as end:
        return int(end.args[0])
    except Exception as error:
        if show_traceback or not isinstance(error, FIXABLE):
            traceback.print_exc()
        print(f"{_prefix()}error: {describe(error)}", file=sys.stderr)
        return exit_code(error)


def _prefix() -> str:
    """Which rank prints a line; rank 0 and a process alone do not say."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def run_stage(arguments: argparse.Namespace, name: str, device: torch.device) -> None:
    """Runs a stage of the run that the arguments describe, unless it is finished and nothing it depends on has changed."""
    from distill.config import load_config
    from distill.run.files import sweep

    config = load_config(arguments.config, arguments.overrides)
    stage = config.stage_of(name)
    if stage.reason_to_run() is None:
        print(f"{name}: done already; nothing it depends on has changed")
        return
    set_up_libraries()
    with only_one(stage.lock_file):
        sweep(config.run_dir)
        stage.run(device)


def remove_left_over(stop: StopRequest) -> None:
    """Removes a file STOP that is not of this start, and reports it."""
    if stop.remove_left_over(STARTED):
        print(f"removed {stop.file}, which an earlier start has left", file=sys.stderr, flush=True)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds a stage's lock as long as this process lives. Raises TemporaryError if another process runs the stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TemporaryError(f"{path}: another process runs this stage; wait for it, or end it") from None
        yield


def report_thread(error: threading.ExceptHookArgs) -> None:
    """What is printed of an error that ends a thread: a line, without a traceback, where the user has to fix it."""
    if isinstance(error.exc_value, FIXABLE):
        name = error.thread.name if error.thread is not None else "a thread"
        print(f"{_prefix()}{name}: {describe(error.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(error)


def log_to_terminal() -> None:
    """Messages of `distill` and of the command lines go to stderr, above a progress bar if there is one."""
    for name in ("distill", "launcher"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, TerminalHandler) for handler in logger.handlers):
            logger.addHandler(TerminalHandler())
        logger.setLevel(logging.INFO)


def set_up_libraries() -> None:
    """Turns off the libraries' progress bars and warnings, and cuDNN attention, which builds a plan for each batch shape."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.backends.cuda.enable_cudnn_sdp(False)


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends a command with."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED if isinstance(error, Terminated) else INTERRUPTED
    if isinstance(error, OSError):
        return USER_ERROR if errno.errorcode.get(error.errno or 0) in FINAL_ERRORS else 1
    return USER_ERROR if isinstance(error, FIXABLE) else 1


def stop_on_signals() -> None:
    """From here on TERM, USR1 and USR2 unwind main, once, as Ctrl-C does; a second Ctrl-C ends this process at once."""

    def unwind(signum: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated

    for each in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(each, unwind)


@contextmanager
def listening(act: Callable[[int], None]) -> Iterator[None]:
    """Inside, act(signum) is called for INT, TERM, USR1 and USR2, in a thread, whatever the main thread is waiting for.

    A handler of Python's own would wait until the main thread comes back from the collective that it is in.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, *STOP_SIGNALS)}
    fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for each in before:
        signal.signal(each, lambda *_: None)  # the number goes through the pipe
        signal.siginterrupt(each, False)

    def read_signals() -> None:
        while data := os.read(reading, 64):
            for signum in data:
                if signum:
                    act(signum)

    thread = threading.Thread(target=read_signals, daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for each, handler in before.items():
            signal.signal(each, handler)
        os.close(writing)  # ends the thread
        thread.join(1)
        os.close(reading)


def end_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends; exits at once if the parent is no longer `parent`."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent not in (None, os.getppid()):  # it ended before
        os._exit(STOPPED)


def describe(error: BaseException) -> str:
    """An error in one line, with what to do where that is known."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{_REMEDIES.get(error.errno or 0, '')}"
    return str(error) if isinstance(error, FIXABLE) else f"{type(error).__name__}: {error}"


def is_one_of_many_ranks() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


_REMEDIES = {
    28: "; free some space and type the same command again: finished shards and checkpoints are kept",
    30: "; choose another place with runs_dir=DIR",
    13: "; choose another place with runs_dir=DIR",
}
