"""python -m distill.report RUN_DIR: writes RUN_DIR/report.html, one page of an evaluated run, from the run's files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.config import load_run
from distill.report.page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.report", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the directory of a run, e.g. runs/quickstart")
    run = parser.parse_args(argv).run
    try:
        print(write_report(load_run(run)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
