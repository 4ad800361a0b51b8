"""The run that the page's tests look at, and the page with hostile text in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distill.config import RunConfig, load_config
from distill.report import write_report
from distill.stages import read_json

HOSTILE = (
    "</q></script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'\"&<svg onload=alert(3)>\u202e"
)


@pytest.fixture(scope="session")
def reported(finished: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A copy, so that these tests may write; the files it names by their paths are those of the run itself."""
    config, directory, _ = finished
    copy = tmp_path_factory.mktemp("reported") / "tiny"
    shutil.copytree(directory, copy)
    run = load_config(config).model_copy(update={"runs_dir": copy.parent})
    write_report(run)
    return run


@pytest.fixture(scope="session")
def hostile(reported: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the same run with hostile text in every file that holds text from outside."""
    copy = tmp_path_factory.mktemp("hostile") / "tiny"
    shutil.copytree(reported.run_dir, copy)

    def change(name, into):
        content = read_json(copy / name)
        into(content)
        (copy / name).write_text(json.dumps(content))

    change("evaluate/neighbours.json", lambda found: [_spoil(example) for example in found["agree"] + found["differ"]])
    change("precompute/text/manifest.json", lambda found: found["sources"][0].update(path=HOSTILE, name=HOSTILE))
    change("evaluate/results.json", lambda found: found.update({HOSTILE: found["hpd"], f"{HOSTILE}-8": found["hpd-8"]}))
    change("evaluate/results.json", lambda found: found["ckd"]["sts"].update({HOSTILE: 1.0}))
    for path in copy.rglob("sessions.jsonl"):
        line = json.loads(path.read_text().splitlines()[0])
        path.write_text(json.dumps({**line, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}) + "\n")
    return write_report(reported.model_copy(update={"runs_dir": copy.parent}))


def _spoil(example):
    example["query"] = HOSTILE
    for side in ("teacher", "student"):
        for near in example[side]:
            near["sentence"] = HOSTILE
