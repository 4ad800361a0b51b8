"""How a collective's bytes divide over the links inside and between nodes."""

from __future__ import annotations

import pytest

from distill.plan.wire import SHARES, Sent


def test_what_all_ranks_of_a_node_need_comes_in_once_and_answers_of_their_own_to_each():
    of = {collective: Sent("any", collective, 1000.0, 1) for collective in SHARES}
    assert of["all_to_all"].between(8, 8) == 875
    assert of["all_gather"].between(8, 8) == pytest.approx(875 / 8)
    assert of["all_reduce"].between(8, 8) == pytest.approx(2 * 875 / 8)
    assert all(each.between(8, 1) == 0 for each in of.values())


def test_an_all_to_all_takes_one_way_or_the_other():
    sent = Sent("answers", "all_to_all", 1000.0, 1)
    for ranks_a_node, nodes in ((8, 8), (1, 4), (2, 1)):
        both = sent.inside(ranks_a_node, nodes) + sent.between(ranks_a_node, nodes)
        assert both == pytest.approx(sent.received(ranks_a_node * nodes))
