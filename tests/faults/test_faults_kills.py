"""kill -9 before file-system calls of every kind, in every stage: started again, the run is what it would have been."""

from __future__ import annotations

import random

import pytest
from fault_run import STAGES, FaultRun, make_run

SHORT = ("text", "precompute", "ckd")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_encoder) -> FaultRun:
    return make_run(tmp_path_factory.mktemp("kills"), tiny_encoder)


def kill_and_finish(run: FaultRun, stage: str, most: int | None) -> None:
    """Kills the stage at calls of all kinds, or of `most` drawn ones; each time it is then finished and compared."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    draw = random.Random(seed)
    run.expect(stage)
    kinds = sorted(run.calls[stage])
    problems = {}
    for kind in kinds if most is None else draw.sample(kinds, min(most, len(kinds))):
        number = draw.randint(1, run.calls[stage][kind])
        run.reach(stage)
        run.kill(stage, kind, number)
        if found := run.problems(stage):
            problems[f"{kind}, call {number} of {run.calls[stage][kind]}"] = found
    assert not problems


@pytest.mark.parametrize("stage", SHORT)
def test_a_stage_that_is_killed_at_a_file_system_call_ends_as_if_it_had_not_been(run, stage):
    kill_and_finish(run, stage, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "hpd", "export", "evaluate", "report"])
def test_a_stage_that_is_killed_at_some_call_ends_as_if_it_had_not_been(run, stage):
    kill_and_finish(run, stage, 1)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_killed_at_every_kind_of_call_ends_as_if_it_had_not_been(run, stage):
    kill_and_finish(run, stage, None)
