"""Planned seconds of the quickstart's CKD stage, after --calibrate, and measured seconds of the stage.

    python tests/bench/plan.py --work /tmp/bench            makes the shards first, once; run nothing else meanwhile

predicted   launcher/plan.py --calibrate: seconds of the stage ckd
measured    launcher/pipeline.py stages=[ckd]: the seconds in ckd/DONE.json, with dev evaluations and checkpoints
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOAL = 0.25


def launch(script: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "launcher" / script), *map(str, arguments)], check=True, stdout=sys.stderr, cwd=ROOT
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run, kept for the next time")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(argv)
    same = ["--config", options.config, f"runs_dir={options.work}", "name=planned", *options.overrides]
    launch("pipeline.py", *same, "stages=[precompute]")
    rounds = []
    for _ in range(options.rounds):
        shutil.rmtree(options.work / "planned" / "ckd", ignore_errors=True)
        launch("plan.py", *same, "--calibrate", "--json", options.work / "plan.json")
        predicted = json.loads((options.work / "plan.json").read_text())["stages"]["ckd"]["seconds"]
        launch("pipeline.py", *same, "stages=[ckd]")
        measured = json.loads((options.work / "planned/ckd/DONE.json").read_text())["results"]["seconds"]
        error = round(predicted / measured - 1, 3)
        rounds.append({"predicted_seconds": round(predicted, 1), "measured_seconds": measured, "relative_error": error})
        print(rounds[-1], file=sys.stderr, flush=True)
    largest = max(abs(each["relative_error"]) for each in rounds)
    result = {"rounds": rounds, "goal": GOAL, "largest_error": largest, "met": largest <= GOAL}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
