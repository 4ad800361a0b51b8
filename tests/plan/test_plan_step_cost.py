"""How the bytes of a collective divide over the links inside and between nodes."""

from __future__ import annotations

import pytest

from distill.plan.step_cost import RING_FACTORS, Collective, bytes_received


def received(operation: str, ranks_per_node: int, nodes: int) -> dict[str, float]:
    return bytes_received([Collective("any", operation, 1000.0, 1)], ranks_per_node, nodes)


def test_ranks_of_a_node_share_the_traffic_between_nodes_except_in_an_all_to_all():
    between = {operation: received(operation, 8, 8)["between_nodes"] for operation in RING_FACTORS}
    assert between["all_to_all"] == 875
    assert between["all_gather"] == pytest.approx(875 / 8)
    assert between["all_reduce"] == pytest.approx(2 * 875 / 8)
    assert all(received(operation, 8, 1)["between_nodes"] == 0 for operation in RING_FACTORS)


def test_each_byte_of_an_all_to_all_is_counted_on_one_link_only():
    for ranks_per_node, nodes in ((8, 8), (1, 4), (2, 1)):
        found, ranks = received("all_to_all", ranks_per_node, nodes), ranks_per_node * nodes
        assert found["inside_node"] == pytest.approx(1000 * (ranks_per_node - 1) / ranks)
        assert found["inside_node"] + found["between_nodes"] == pytest.approx(found["total"])
        assert found["any"] == found["total"] == pytest.approx(1000 * (ranks - 1) / ranks)
