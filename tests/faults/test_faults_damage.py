"""Files that are damaged between two stages, or between a kill and its resume: found and named, or of no influence."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from damage import HOW, damage, files_by_kind
from fault_run import STAGES, FaultRun, differing, end_state, make_run

# a call of each stage before which it has written all that a resume reads
KILLED_AT = {
    "precompute": "open shards/.manifest.json.WRITER.part",
    "ckd": "open ckd/.DONE.json.WRITER.part",
    "finetune": "open finetune/.DONE.json.WRITER.part",
    "hpd": "open hpd/.DONE.json.WRITER.part",
    "export": "open export/.DONE.json.WRITER.part",
}
BETWEEN = ("precompute", "ckd", "finetune", "hpd", "export", "evaluate", "report")
STATES = [*((stage, False) for stage in BETWEEN), *((stage, True) for stage in KILLED_AT)]
OUTCOMES = ("repaired, named", "refused", "not read", "no influence")
NAMES = [f"{stage}, {'killed before' if killed else 'not begun'}" for stage, killed in STATES]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_encoder) -> FaultRun:
    return make_run(tmp_path_factory.mktemp("damage"), tiny_encoder)


def damage_and_start(run: FaultRun, stage: str, killed: bool, kind: str, how: str, draw: random.Random) -> str:
    """Damages a file of a kind before a stage starts; returns one of OUTCOMES, or what is wrong."""
    run.reach(stage)
    if killed:
        run.kill(stage, KILLED_AT[stage], 1)
    path = draw.choice(files_by_kind(run.run_dir)[kind])
    name = str(path.relative_to(run.run_dir))
    damage(path, how, draw)
    damaged = path.read_bytes() if path.exists() else None
    done = run.start(stage)
    is_named = path.parent.name in done.stdout and (path.name in done.stdout or how == "delete")
    if done.returncode:
        return "refused" if done.returncode == 2 and is_named else f"exit code {done.returncode}: {done.stdout[-2000:]}"
    left = [each for each in differing(end_state(run.run_dir), run.expected[stage]) if not harmless(run, each)]
    if left == [f"{name}: {'missing' if damaged is None else 'different'}"]:
        same = path.exists() == (damaged is not None) and (damaged is None or path.read_bytes() == damaged)
        return "not read" if same else f"{name} was written again and differs: {done.stdout[-1000:]}"
    if left:
        return f"{left}: {done.stdout[-1000:]}"
    return "repaired, named" if is_named else "no influence"


def harmless(run: FaultRun, difference: str) -> bool:
    """Whether a difference may be: a damaged file that was set aside, or curves, which no stage reads."""
    path, _, what = difference.rpartition(": ")
    set_aside = what == "missing" and (run.run_dir / f"{path}.damaged").exists()
    return set_aside or ".damaged" in path or path.startswith("tensorboard/")


def previous(stage: str, killed: bool) -> str:
    """The state of the run before the stage whose files are new: the killed one, or the one before this."""
    return stage if killed else list(STAGES)[list(STAGES).index(stage) - 1]


def check(run: FaultRun, stage: str, killed: bool, most: int | None, flips: int) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    draw = random.Random(seed)
    run.expect(stage)
    run.reach(stage)
    if killed:
        run.kill(stage, KILLED_AT[stage], 1)
    before = files_by_kind(run.kept / previous(stage, killed)) if stage != "precompute" or killed else {}
    new = [kind for kind in files_by_kind(run.run_dir) if kind not in before]  # others were damaged before an earlier stage
    cases = [(kind, how) for kind in new for how in (*["flip"] * flips, *HOW[1:])]
    outcomes, wrong = defaultdict(Counter), {}
    for kind, how in cases if most is None else draw.sample(cases, min(most, len(cases))):
        outcome = damage_and_start(run, stage, killed, kind, how, draw)
        if outcome in OUTCOMES:
            outcomes[kind][outcome] += 1
        else:
            wrong[f"{kind}, {how}"] = outcome
    for kind, counts in sorted(outcomes.items()):
        print(f"{kind:60} {dict(counts)}")
    assert not wrong


@pytest.mark.parametrize(("stage", "killed"), [pytest.param("ckd", False, marks=pytest.mark.slow), ("ckd", True)])
def test_a_damaged_file_is_named_or_of_no_influence(run, stage, killed):
    check(run, stage, killed, most=3, flips=4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "killed"), [("finetune", True), ("hpd", False)])
def test_some_damaged_files_are_named_or_of_no_influence(run, stage, killed):
    check(run, stage, killed, most=2, flips=4)


@pytest.mark.soak
@pytest.mark.parametrize(("stage", "killed"), STATES, ids=NAMES)
def test_damage_to_every_kind_of_file_is_named_or_of_no_influence(run, stage, killed):
    check(run, stage, killed, most=None, flips=5)
