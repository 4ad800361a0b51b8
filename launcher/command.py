"""What the launchers share: --config, overrides, and errors that are one line."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from distill.config import RunConfig, load_config
from distill.memory import keep_freed_memory

ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "davinci*", "dri/render*")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches come from a thread, ranks are processes
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not any(any(Path("/dev").glob(pattern)) for pattern in ACCELERATORS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning a process

INTERRUPTED = 130


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", required=True, help="the run's YAML, e.g. configs/quickstart.yaml")
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
    """Exits with main's code; with 2 and one line for what a user can mend, with 130 on Ctrl-C."""
    prefix = f"rank {rank}: " if rank else ""
    keep_freed_memory()
    try:
        code = main() or 0
    except KeyboardInterrupt:
        print(f"{prefix}interrupted; the same command goes on from here", file=sys.stderr)
        code = INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"{prefix}error: {describe(error)}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if rank_is_one_of_many() else sys.exit(code)


def describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{_REMEDIES.get(error.errno or 0, '')}"
    return str(error)


def rank_is_one_of_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_REMEDIES = {
    28: "; free some space and type the same command again: finished shards and checkpoints are kept",
    30: "; choose another place with runs_dir=DIR",
    13: "; choose another place with runs_dir=DIR",
}
