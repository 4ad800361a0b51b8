"""Devices are found by whole words of the names that drivers give them."""

from __future__ import annotations

import pytest

from distill.plan.devices import load_devices


@pytest.mark.parametrize(
    ("called", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("h200", "H200"),
        ("cpu", "cpu"),
    ],
)
def test_a_device_is_found_under_the_name_that_its_driver_gives_it(called, known):
    assert load_devices().find(called)[0] == known


@pytest.mark.parametrize("called", ["NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "abacus"])
def test_a_device_with_a_similar_name_is_not_mistaken_for_it(called):
    with pytest.raises(ValueError, match=r"no device .*H100.*--devices"):
        load_devices().find(called)
