"""Builders of the planner's inputs for tests: clusters of devices from the shipped table, and the Inputs of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distill.config import RunConfig
from distill.plan.devices import Cluster, load_devices
from distill.plan.planner import Inputs, collect_inputs


def cluster_of(
    device: str = "cpu", nodes: int = 1, ranks_per_node: int = 2, *, is_bf16: bool = False, **values: float
) -> Cluster:
    """values: replace those of the device in the table."""
    table = load_devices()
    return Cluster(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        device_name=device,
        device=replace(table.devices[device], **values),
        assumed=table.assumed,
        is_bf16=is_bf16,
    )


def inputs_of(config: RunConfig, cluster: Cluster | None = None, **given: Any) -> Inputs:
    return collect_inputs(config, cluster or cluster_of(), **given)
