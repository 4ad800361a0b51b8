#!/usr/bin/env python3
"""Trains several students of one teacher and puts them beside each other: quality, size, speed, with intervals.

    python launcher/study.py configs/study [key=value ...]
    python launcher/study.py configs/study --over my-text.yaml      my own text and teacher, for every student

A student is a YAML file of the folder; what they share is in its base.yaml. Runs, figures, table.txt, table.md and the plots go
into the students' runs_dir. What is finished is not done again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import command

LAUNCHER = Path(__file__).resolve().parent


def main() -> int:
    from distill.config import dump_config
    from distill.files import publish, write_json
    from distill.study.configs import configs_of
    from distill.study.plots import require_matplotlib

    configs = configs_of(arguments.folder, arguments.over, arguments.overrides)
    require_matplotlib()
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
    import torch

    from distill.study import Bench, draw, markdown, measure_all, models_of, results_of, text

    command.quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(configs[0], device)
    results = results_of(measure_all(list(models_of(configs, device)), bench, runs / "measured"))
    write_json(runs / "results.json", results)
    for name, table in (("table.txt", text(results)), ("table.md", markdown(results))):
        with publish(runs / name) as file:
            file.write(table.encode() + b"\n")
    draw(results, runs)
    print(f"\n{text(results)}\n\nin {(time.monotonic() - started) / 60:.0f} minutes; {runs}/results.json, table.md, *.svg")
    return 0


def pipeline(config: Path) -> int:
    """Its exit code. A signal to this process is one to the run, which ends with a checkpoint."""
    with subprocess.Popen([sys.executable, str(LAUNCHER / "pipeline.py"), "--config", str(config)]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as stop:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise stop


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with base.yaml and a config for each student")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over a key of every student, e.g. engine.num_ranks=8"
    )
    parser.add_argument("--over", type=Path, metavar="FILE.yaml", help="the same from a file, e.g. text and teacher")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    arguments = parser.parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
