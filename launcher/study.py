#!/usr/bin/env python3
"""Trains several students of one teacher and compares them: quality, size and speed, with intervals.

    python launcher/study.py configs/study [key=value ...]
    python launcher/study.py configs/study --over my-text.yaml      other text and another teacher, for every student

A student is a YAML file of the folder; base.yaml there is what they share. Runs, results.json, table.txt, table.md and charts
go into the students' runs_dir. Finished work is not repeated: the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command

LAUNCHER = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=command.path, help="a folder with base.yaml and a config for each student")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over a key of every student, e.g. engine.num_ranks=8"
    )
    parser.add_argument("--over", type=command.path, metavar="FILE.yaml", help="the same from a file, e.g. text and teacher")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    arguments = parser.parse_intermixed_args(argv)
    return command.run(lambda: study(arguments), show_traceback=arguments.traceback)


def study(arguments: argparse.Namespace) -> int:
    from distill.metrics.results import write_results
    from distill.run.config import dump_config
    from distill.run.files import publish
    from distill.run.formatting import format_duration, format_markdown_table
    from distill.study.study_charts import write_charts
    from distill.study.study_configs import read_study
    from distill.study.study_rows import read_rows, study_table

    configs = read_study(arguments.folder, arguments.over, arguments.overrides)
    runs = configs[0].runs_dir
    runs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number, config in enumerate(configs):
        print(f"{config.name} ({number + 1} of {len(configs)})", flush=True)
        path = runs / f"{config.name}.yaml"
        with publish(path) as file:
            file.write(dump_config(config).encode())
        if code := pipeline(path):
            return code
    rows = read_rows(configs)
    write_results(runs / "results.json", {row.name: row.results for row in rows})
    table = study_table(rows)
    for name, content in (("table.txt", str(table)), ("table.md", format_markdown_table(table.header, table.rows))):
        with publish(runs / name) as file:
            file.write(content.encode() + b"\n")
    write_charts(rows, runs)
    print(f"\n{table}\n\nin {format_duration(time.monotonic() - started)}; {runs}/results.json, table.md, *.svg")
    return 0


def pipeline(config: Path) -> int:
    """The exit code of the pipeline. A signal to this process is passed on to the run, which ends with a checkpoint."""
    with subprocess.Popen([sys.executable, str(LAUNCHER / "pipeline.py"), "--config", str(config)]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as stop:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise stop


if __name__ == "__main__":
    command.start(main)
