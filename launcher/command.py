"""What the launchers share: --config, overrides, and errors that are one line."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

try:
    from distill.config import RunConfig, load_config
    from distill.memory import keep_freed_memory
except ModuleNotFoundError as absent:
    print(
        f"error: {sys.executable} has no {absent.name}: run `bash launcher/install.sh` once, then `source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

MENDABLE = (ValueError, OSError, FloatingPointError)  # by the user
GOES_ON = "the same command goes on from here"
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "davinci*", "dri/render*")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches come from a thread, ranks are processes
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not any(any(Path("/dev").glob(pattern)) for pattern in ACCELERATORS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning a process
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # gloo prints a page for what it raises as well

MENDED_BY_USER = 2  # the exit code of an error whose message says how
STOPPED = 75  # EX_TEMPFAIL: stopped as asked, and the same command goes on
INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Ended(Exception):
    """An end that needs no more words: they are said already, here or by another rank. Its argument is the exit code."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, SIGUSR1 or SIGUSR2, which end a command as Ctrl-C does, with STOPPED."""


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", required=True, metavar="FILE.yaml", help="the run's YAML, e.g. configs/quickstart.yaml")
    made.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, e.g. ckd.lr=1e-4 name=trial")
    return made


def config_of(arguments: argparse.Namespace) -> RunConfig:
    return load_config(arguments.config, arguments.overrides)


def quiet_libraries() -> None:
    """No bars and warnings but our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def run(main: Callable[[], int | None], *, rank: int = 0, show_traceback: bool = False) -> None:
    """Exits with main's code; with 2 and one line for what a user can mend, with 75 if it was stopped, with 130 on Ctrl-C."""
    prefix = f"rank {rank}: " if rank else ""
    keep_freed_memory()
    try:
        stop_on_signals()
        code = main() or 0
    except KeyboardInterrupt as stop:
        code = exit_code(stop)
        print(f"{prefix}{'stopped' if code == STOPPED else 'interrupted'}; {GOES_ON}", file=sys.stderr)
    except Ended as ended:
        (code,) = ended.args
    except Exception as error:
        if show_traceback or not isinstance(error, MENDABLE):
            traceback.print_exc()
        print(f"{prefix}error: {describe(error)}", file=sys.stderr)
        code = exit_code(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if rank_is_one_of_many() else sys.exit(code)


def exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return STOPPED if isinstance(error, Terminated) else INTERRUPTED
    return MENDED_BY_USER if isinstance(error, MENDABLE) and not isinstance(error, TimeoutError) else 1


def stop_on_signals() -> None:
    """From here on TERM, USR1 and USR2 unwind main, once, as Ctrl-C does; a second Ctrl-C ends this process at once."""

    def unwind(signum: int, frame: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated

    for each in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(each, unwind)


def listen(act: Callable[[int], None]) -> None:
    """From here on, calls act(signum) for INT, TERM, USR1 and USR2, in a thread, whatever the main thread is waiting for.

    A handler of Python's own would wait until the main thread comes back from the collective that it is in.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for each in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(each, lambda *_: None)  # the number goes through the pipe
        signal.siginterrupt(each, False)

    def hear() -> None:
        while True:
            for signum in os.read(reading, 64):
                act(signum)

    threading.Thread(target=hear, daemon=True, name="signals").start()


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that comes about."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{_REMEDIES.get(error.errno or 0, '')}"
    return str(error) if isinstance(error, MENDABLE) else f"{type(error).__name__}: {error}"


def rank_is_one_of_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_REMEDIES = {
    28: "; free some space and type the same command again: finished shards and checkpoints are kept",
    30: "; choose another place with runs_dir=DIR",
    13: "; choose another place with runs_dir=DIR",
}
