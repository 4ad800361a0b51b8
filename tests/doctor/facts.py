"""The facts of healthy nodes, for a test to change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from distill.config import load_config
from distill.doctor.check import Context
from distill.doctor.diagnosis import Diagnosis, Report, diagnose
from distill.doctor.rendezvous import AllReduce

HEALTHY: dict[str, dict[str, Any]] = {
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
        "summary": "Python 3.12, torch 2.13.0",
    },
    "deepspeed": {
        "error": "",
        "settings_error": "",
        "needed": 1e9,
        "memory": 8e9,
        "holder": "the node",
        "summary": "0.19.8, ZeRO 1, states 1 GB",
    },
    "devices": {
        "gpus": [],
        "driver": None,
        "cuda": None,
        "bf16": True,
        "cores": 8,
        "ranks": 2,
        "threads": 4,
        "summary": "8 cores, bf16",
    },
    "names": {
        "host": "n1",
        "addresses": ["10.0.0.1"],
        "master": ["10.0.0.1"],
        "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]},
        "named_interfaces": {},
        "summary": "n1 = 10.0.0.1",
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
        "estimate": "1 GB",
        "summary": "50 GB free (nfs4), 1 GB needed",
    },
    "shm": {"free": 8_000_000_000, "leftovers": 0, "ranks": 2, "summary": "8 GB free"},
    "clocks": {"ahead": 0.01, "summary": "+0.01 s"},
    "limits": {"files": 65536, "locked": -1, "has_gpus": False, "summary": "65536 files"},
    "inputs": {
        "errors": {},
        "sizes": {"text.txt": 1000},
        "hub": {},
        "offline": False,
        "summary": "1 files and models, 1 kB",
    },
}


def reports(num_nodes: int, **on_n2: dict[str, Any]) -> dict[int, Report]:
    """The reports of so many healthy nodes, by rank; n2's facts are changed, by check."""
    made = {}
    for rank in range(num_nodes):
        facts = copy.deepcopy(HEALTHY)
        address = f"10.0.0.{rank + 1}"
        facts["names"] |= {"host": f"n{rank + 1}", "addresses": [address]}
        facts["names"]["interfaces"]["eth0"] = [address]
        facts["storage"] |= {"is_shared": True, "is_locked": True} if rank else {}
        for check, change in on_n2.items() if rank == 1 else ():
            facts[check] |= change
        made[rank] = {"host": f"n{rank + 1}", "local_rank": 0, "facts": facts}
    return made


def context_of(config: Path, num_nodes: int = 2, *overrides: str, **more: Any) -> Context:
    hosts = tuple(f"n{number + 1}" for number in range(num_nodes))
    usual = {"started": 0.0, "world_size": num_nodes, "hosts": hosts, "master_addr": "n1"}
    return Context(load_config(config, list(overrides)), **(usual | more))


def diagnosis_of(config: Path, found: dict[int, Report], *overrides: str) -> Diagnosis:
    """Rank 0's diagnosis of nodes of which all have reported."""
    context = context_of(config, len(found), *overrides)
    return diagnose(context, found, reduced=AllReduce(bandwidth=1.2e9), waited=8.0)
