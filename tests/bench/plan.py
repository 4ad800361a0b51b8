"""The planner's time of the quickstart's CKD stage, after --calibrate, against what the stage then takes.

    python tests/bench/plan.py --work /tmp/bench            the shards are made first, once; nothing else may run meanwhile

predicted   launcher/plan.py --calibrate: its seconds of the stage ckd
measured    launcher/pipeline.py stages=[ckd]: the seconds in ckd/DONE.json, dev evaluations and checkpoints with it
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOAL = 0.25


def launched(script: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "launcher" / script), *map(str, arguments)], check=True, stdout=sys.stderr, cwd=ROOT
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--work", type=Path, required=True, help="where the run is kept for the next time")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    same = ["--config", options.config, f"runs_dir={options.work}", "name=planned", *options.overrides]
    launched("pipeline.py", *same, "stages=[precompute]")
    rounds = []
    for _ in range(options.rounds):
        shutil.rmtree(options.work / "planned" / "ckd", ignore_errors=True)
        launched("plan.py", *same, "--calibrate", "--json", options.work / "plan.json")
        predicted = json.loads((options.work / "plan.json").read_text())["stages"]["ckd"]["seconds"]
        launched("pipeline.py", *same, "stages=[ckd]")
        measured = json.loads((options.work / "planned/ckd/DONE.json").read_text())["results"]["seconds"]
        rounds.append({"predicted": round(predicted, 1), "measured": measured, "off": round(predicted / measured - 1, 3)})
        print(rounds[-1], file=sys.stderr, flush=True)
    worst = max(abs(each["off"]) for each in rounds)
    result = {"rounds": rounds, "goal": GOAL, "worst": worst, "met": worst <= GOAL}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
