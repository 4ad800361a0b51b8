"""What nodes find of themselves where all is well, to be made worse by a test."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from distill.config import load_config
from distill.doctor.diagnosis import Evidence
from distill.doctor.start import Start

FACTS: dict[str, dict[str, Any]] = {
    "software": {
        "python": "3.12",
        "packages": {
            "torch": "2.13.0",
            "deepspeed": "0.19.8",
            "transformers": "5.23.0",
            "tokenizers": "0.23.3",
            "numpy": "2.4.6",
            "webdataset": "1.0.2",
        },
        "code": {"distill/config.py": "aa", "launcher/train.py": "bb"},
        "config": "cc",
        "executable": "/opt/python",
        "root": "/home/distill",
    },
    "deepspeed": {
        "error": "",
        "settings_error": "",
        "version": "0.19.8",
        "stage": 1,
        "offloads": False,
        "forces": False,
        "needed": 1e9,
        "memory": 8e9,
        "holder": "the node",
    },
    "devices": {"gpus": [], "driver": None, "cuda": None, "bf16": True, "cores": 8, "ranks": 2, "threads": 4},
    "names": {
        "host": "n1",
        "own": ["10.0.0.1"],
        "can_listen": True,
        "master": ["10.0.0.1"],
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
        "wanted": {},
    },
    "storage": {
        "path": "/shared/runs/x",
        "error": "",
        "errno": 0,
        "lock": "",
        "mount": "/shared",
        "kind": "nfs4 server:/shared",
        "free": 50_000_000_000,
        "needed": 1_000_000_000,
        "estimate": "1.0 GB",
    },
    "shm": {"free": 8_000_000_000, "left": 0, "ranks": 2},
    "clocks": {"ahead": 0.01},
    "limits": {"files": 65536, "locked": -1, "has_gpus": False},
    "inputs": {"errors": {}, "sizes": {"text.txt": 1000}, "hub": {}, "offline": False},
}


def facts(node: int, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What node `node` finds, counted from 1, with `changes` to single checks."""
    found = copy.deepcopy(FACTS)
    found["names"] |= {"host": f"n{node}", "own": [f"10.0.0.{node}"]}
    for check, change in changes.items():
        found[check] |= change
    return found


def reports(num_nodes: int, **on_n2: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """A report of each node, by rank; what is particular to n2 is given by check."""
    return {
        rank: {
            "host": f"n{rank + 1}",
            "local_rank": 0,
            "is_late": False,
            "is_locked": True,
            "facts": facts(rank + 1, **(on_n2 if rank == 1 else {})),
        }
        for rank in range(num_nodes)
    }


def evidence(num_nodes: int = 2, **on_n2: dict[str, Any]) -> Evidence:
    found = reports(num_nodes, **on_n2)
    return Evidence(by_files=found, by_network=found, waited=8.0, bandwidth=1.2e9)


def start_of(config: Path, num_nodes: int = 2, *overrides: str, **more: Any) -> Start:
    hosts = tuple(f"n{number + 1}" for number in range(num_nodes))
    defaults = {
        "name": "trial",
        "began": 0.0,
        "launcher": config.parent,
        "world_size": num_nodes,
        "hosts": hosts,
        "address": "n1",
    }
    return Start(load_config(config, list(overrides)), **(defaults | more))
