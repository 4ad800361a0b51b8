"""The losses of every stage are those in stored.json, as far as rounding on another processor allows.

    python tests/golden/golden.py collect --tree . --out values.json && python tests/golden/test_golden.py values.json

writes stored.json again; a commit that does so says why and changes nothing else.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from golden import SETUPS, collect

STORED = Path(__file__).with_name("stored.json")
KEPT = re.compile(r"/curves/loss|^shards/text$|^results/.*/(dim|params|bytes_per_vector)$")  # no digests: kernels differ
TOLERANCE = 3e-4  # relative; between AVX2 and AVX-512 the losses differ by up to 5e-5
# one_rank_zero0 sets ckd.group_shuffling: rounding decides in which group a similarity near a boundary is shuffled, so that
# the losses of later steps differ by up to 0.003, and the smallest of their terms by 0.03
SHUFFLED, SHUFFLED_TERM = 0.01, 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "setups", [["one_rank_zero0", "two_ranks_zero3"], pytest.param(list(SETUPS), marks=pytest.mark.soak)], ids=["two", "all"]
)
def test_losses_text_fingerprint_and_sizes_are_the_stored_ones(setups):
    found, stored = collect(Path(__file__).parents[2], setups=setups), json.loads(STORED.read_text())
    left_out = tuple(f"{name}/" for name in SETUPS.keys() - setups)
    stored = {name: value for name, value in stored.items() if not name.startswith(left_out)}
    kept = {name: value for name, value in found.items() if KEPT.search(name)}
    assert kept.keys() == stored.keys()
    wrong = {name: (stored[name], value) for name, value in kept.items() if not is_close(name, value, stored[name])}
    assert not wrong


def is_close(name, found, stored):
    if not isinstance(stored, dict):
        return found == stored
    if not name.startswith("one_rank_zero0/"):
        return found == pytest.approx(stored, rel=TOLERANCE, abs=TOLERANCE / 100)
    if name.endswith("/ckd/curves/loss") and found["1"] != pytest.approx(stored["1"], rel=TOLERANCE):
        return False
    return found == pytest.approx(stored, rel=SHUFFLED if name.endswith("/curves/loss") else SHUFFLED_TERM, abs=TOLERANCE / 100)


if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kept = {name: value for name, value in values.items() if KEPT.search(name)}
    STORED.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
