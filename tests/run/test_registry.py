"""Registries take classes from installed packages, and refuse what is none by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from distill.objectives.loss_terms.base import LossTerm
from distill.run import registry

GROUP = "distill.loss_terms"
PACKAGE = "distill.objectives.loss_terms"


class Nameless(LossTerm):
    pass


class TakenName(LossTerm):
    name = "ckd"


@pytest.mark.parametrize(
    "entry, message",
    [
        ("Nameless", "entry point 'extra' of distill.loss_terms: Nameless sets no `name`"),
        ("TakenName", "'ckd' is the name of"),
        ("pytest", "not a subclass of LossTerm"),
    ],
)
def test_an_entry_point_that_is_no_entry_is_refused_by_name(monkeypatch, entry, message):
    points = [EntryPoint("extra", f"{__name__}:{entry}", GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry._find.cache_clear()
    with pytest.raises(ValueError, match=message):
        registry.find_entries(PACKAGE, GROUP, LossTerm)
    registry._find.cache_clear()
