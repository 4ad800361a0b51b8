"""Each fault is found, on its node and by its name; where all is well nothing is."""

from __future__ import annotations

import errno
import time
from dataclasses import replace

import pytest
from conftest import write_config
from healthy import FACTS, evidence, start_of

from distill.doctor.checks import CHECKS, look
from distill.doctor.diagnosis import diagnose

H100, A100 = ["NVIDIA H100", 80], ["NVIDIA A100", 40]


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def found(start, collected):
    return [(each.check, each.node, each.is_fault) for each in diagnose(start, collected).findings]


@pytest.mark.parametrize("num_nodes", [1, 2, 64])
def test_nodes_that_are_alike_and_well_have_no_findings(config, num_nodes):
    diagnosis = diagnose(start_of(config, num_nodes), evidence(num_nodes))
    assert diagnosis.findings == () and diagnosis.code == 0
    assert list(diagnosis.notes) == [f"n{number + 1}" for number in range(num_nodes)]


def test_what_a_node_finds_is_what_these_tests_make_worse(config):
    start = start_of(config, 1, began=time.monotonic())
    facts = look(start, time.monotonic() + 60, time.monotonic() + 60)
    assert facts.keys() == FACTS.keys() == {check.name for check in CHECKS}
    for check, expected in FACTS.items():
        assert facts[check].keys() == expected.keys(), check


PACKAGES = FACTS["software"]["packages"]
FAULTS = {
    "python": ({"software": {"python": "3.11"}}, "Python is 3.11 here, 3.12 on n1"),
    "package": ({"software": {"packages": PACKAGES | {"numpy": "1.26.4"}}}, "numpy is 1.26.4 here, 2.4.6 on n1"),
    "no package": ({"software": {"packages": PACKAGES | {"torch": None}}}, "torch is missing here, 2.13.0 on n1"),
    "code": ({"software": {"code": {"distill/config.py": "aa", "launcher/train.py": "zz"}}}, "of n1: launcher/train.py"),
    "config": ({"software": {"config": "dd"}}, "the config says other things here than on n1"),
    "import": ({"deepspeed": {"error": "ImportError: libfoo"}}, "DeepSpeed does not import: ImportError: libfoo"),
    "settings": ({"deepspeed": {"settings_error": "no DeepSpeed configuration at x"}}, "no DeepSpeed configuration at x"),
    "number of gpus": ({"devices": {"gpus": [H100, H100]}}, "2 x NVIDIA H100 80 GiB here, no GPU on n1"),
    "driver": ({"devices": {"driver": "550.1", "gpus": []}}, "the GPU driver is 550.1 here, None on n1"),
    "bf16": ({"devices": {"bf16": False}}, "no bf16 here, but on n1"),
    "own name": ({"names": {"own": []}}, "its own name n2 cannot be resolved"),
    "loopback": ({"names": {"own": ["127.0.1.1"]}}, "its own name n2 is 127.0.1.1 here"),
    "foreign address": ({"names": {"own": ["10.9.9.9"], "can_listen": False}}, "10.9.9.9 here, which is no address"),
    "master": ({"names": {"master": []}}, "MASTER_ADDR n1 cannot be resolved here"),
    "master is loopback": ({"names": {"master": ["127.0.0.1"]}}, "MASTER_ADDR n1 is 127.0.0.1 here"),
    "gloo interface": ({"names": {"wanted": {"GLOO_SOCKET_IFNAME": "ib7"}}}, "GLOO_SOCKET_IFNAME names ib7"),
    "nccl interface": ({"names": {"wanted": {"NCCL_SOCKET_IFNAME": "=et"}}}, "NCCL_SOCKET_IFNAME names et"),
    "read-only": ({"storage": {"error": "Read-only file system", "errno": errno.EROFS}}, "cannot be written here: Read-only"),
    "locks": ({"storage": {"lock": "flock is refused: Function not implemented"}}, "flock is refused"),
    "shm": ({"shm": {"free": 0}}, "/dev/shm is full"),
    "model": ({"inputs": {"errors": {"teacher.model": "no model at /m"}}}, "teacher.model: no model at /m"),
    "other text": ({"inputs": {"sizes": {"text.txt": 7}}}, "text.txt is not what it is on n1: 7 bytes here, 1,000 there"),
    "hub": ({"inputs": {"hub": {"teacher.model": "a/b"}, "offline": True}}, "a/b is not in this node's cache"),
    "hangs": ({"inputs": {"failed": "not back after 10 s"}}, "the check could not be made: not back after 10 s"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_its_node(config, name):
    change, words = FAULTS[name]
    diagnosis = diagnose(start_of(config, 2, "engine.precision=auto"), evidence(**change))
    faults = [each for each in diagnosis.findings if each.is_fault]
    assert [(each.check, each.node) for each in faults] == [(next(iter(change)), "n2")]
    assert words in faults[0].what and faults[0].fix
    assert diagnosis.code == 1


WARNINGS = {
    "threads": ({"devices": {"threads": 16}}, "2 ranks x 16 threads"),
    "no threads": ({"devices": {"threads": None}}, "OMP_NUM_THREADS is not set"),
    "little shm": ({"shm": {"free": 100_000_000}}, "/dev/shm has 100 MB free"),
    "behind": ({"clocks": {"ahead": -3600.0}}, "3,600 s behind"),
    "ahead": ({"clocks": {"ahead": 11.0}}, "11 s ahead of"),
    "files": ({"limits": {"files": 256}}, "may open 256 files"),
    "locked": ({"limits": {"locked": 65536, "has_gpus": True}}, "may lock 0 MB"),
    "memory": ({"deepspeed": {"needed": 9e9}}, "need 9.0 GB, and the node has 8.0 GB"),
    "download": ({"inputs": {"hub": {"teacher.model": "a/b"}}}, "would be downloaded"),
    "slow import": ({"devices": {"failed": "not back after 10 s", "importing": "torch"}}, "`import torch` is not back"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_named_on_its_node_and_is_no_fault(config, name):
    change, words = WARNINGS[name]
    diagnosis = diagnose(start_of(config), evidence(**change))
    assert [(each.check, each.node, each.is_fault) for each in diagnosis.findings] == [(next(iter(change)), "n2", False)]
    assert words in diagnosis.findings[0].what and diagnosis.findings[0].fix
    assert diagnosis.code == 0


FINE = {
    "loopback, with an interface": {"names": {"own": ["127.0.1.1"], "wanted": {"GLOO_SOCKET_IFNAME": "eth0"}}},
    "nccl's interfaces by their beginning": {"names": {"wanted": {"NCCL_SOCKET_IFNAME": "eth"}}},
    "nccl's interfaces to leave out": {"names": {"wanted": {"NCCL_SOCKET_IFNAME": "^docker"}}},
    "clocks": {"clocks": {"ahead": 5.0}},
    "no clock": {"clocks": {"ahead": None}},
}


@pytest.mark.parametrize("name", FINE)
def test_what_harms_nobody_is_no_finding(config, name):
    assert found(start_of(config), evidence(**FINE[name])) == []


def test_mixed_processors_are_fine_with_a_precision_that_all_have(config):
    assert found(start_of(config, 2, "engine.precision=fp32"), evidence(devices={"bf16": False})) == []
    asked = found(start_of(config, 2, "engine.precision=bf16"), evidence(devices={"bf16": False}))
    assert asked == [("devices", "n2", True)]


def test_more_ranks_than_gpus(config):
    both = evidence(devices={"gpus": [A100]})
    both.by_files[0]["facts"]["devices"]["gpus"] = [A100]
    assert found(start_of(config), both) == [("devices", "n1", True), ("devices", "n2", True)]


def test_the_odd_one_of_many_is_named_and_not_rank_0(config):
    many = evidence(8)
    many.by_files[0]["facts"]["software"]["python"] = "3.11"
    assert found(start_of(config, 8), many) == [("software", "n1", True)]


@pytest.mark.parametrize(
    "storage, expected",
    [
        ({"free": 900_000_000}, [("storage", "n1", True)]),
        ({"free": 900_000_000, "needed": None, "estimate": "not known"}, [("storage", "n1", False)]),
        ({"free": 2_000_000_000, "needed": None, "estimate": "not known"}, []),
    ],
)
def test_room_for_the_run_is_looked_at_once(config, storage, expected):
    collected = evidence(storage=storage)
    collected.by_files[0]["facts"]["storage"] |= storage
    assert found(start_of(config), collected) == expected


def test_a_lock_that_does_not_reach_another_node(config):
    collected = evidence()
    collected.by_files[1]["is_locked"] = False
    assert found(start_of(config), collected) == [("storage", "n2", True)]


def without(reports, rank):
    return {number: report for number, report in reports.items() if number != rank}


def test_a_node_that_nobody_hears_of_has_not_reported(config):
    whole = evidence(3)
    silent = replace(whole, by_files=without(whole.by_files, 1), by_network=without(whole.by_network, 1), bandwidth=None)
    (only,) = diagnose(start_of(config, 3), silent).findings
    assert (only.check, only.node, only.is_fault) == ("reports", "n2", True)
    assert only.what.startswith("has not reported within 8 s") and "its process did not start" in only.what


def test_a_node_that_began_and_hangs(config):
    whole = evidence()
    began = {0: whole.by_files[0], 1: {"host": "n2", "local_rank": 0}}
    (only,) = diagnose(start_of(config), replace(whole, by_files=began, by_network={0: whole.by_network[0]})).findings
    assert (only.check, only.node) == ("reports", "n2") and "has begun, but has not reported" in only.what


def test_another_file_system_at_the_run_directory(config):
    whole = evidence(storage={"kind": "tmpfs none"})
    (only,) = diagnose(start_of(config), replace(whole, by_files=without(whole.by_files, 1))).findings
    assert (only.check, only.node) == ("storage", "n2")
    assert "nfs4 server:/shared on n1, tmpfs none on n2" in only.what


def test_a_run_directory_that_rank_0_cannot_write_is_rank_0s_fault_alone(config):
    whole = evidence()
    whole.by_files[0]["facts"]["storage"]["error"] = "Permission denied"
    assert found(start_of(config), replace(whole, by_files=without(whole.by_files, 1))) == [("storage", "n1", True)]


def test_a_node_that_does_not_come_to_the_meeting(config):
    whole = evidence()
    whole.by_files[1]["network_error"] = "DistNetworkError: timed out"
    (only,) = diagnose(start_of(config), replace(whole, by_network=without(whole.by_network, 1), bandwidth=None)).findings
    assert (only.check, only.node) == ("network", "n2")
    assert "rank 1 reports over the run directory, but has not come to n1:29500" in only.what and "timed out" in only.what


def test_a_port_that_is_taken(config):
    whole = evidence()
    taken = replace(whole, by_network={0: whole.by_network[0]}, network_error="EADDRINUSE, port: 29500", bandwidth=None)
    (only,) = diagnose(start_of(config), taken).findings
    assert (only.check, only.node) == ("network", "n1") and "port 29500 is in use on n1" in only.what


def test_an_all_reduce_that_fails(config):
    (only,) = diagnose(
        start_of(config), replace(evidence(), reduce_errors={1: "RuntimeError: refused"}, bandwidth=None)
    ).findings
    assert (only.check, only.node) == ("network", "n2") and "the all-reduce failed on n2: RuntimeError: refused" in only.what


def test_two_nodes_of_one_host_name_are_two(config):
    collected = evidence()
    collected.by_files[1]["host"] = "n1"
    assert list(diagnose(start_of(config), collected).notes) == ["n1", "n1 (rank 1)"]


def test_what_no_node_has_is_told_from_what_one_lacks(config):
    change = {"inputs": {"errors": {"teacher.model": "no model at /m"}}}
    on_all = evidence(**change)
    for report in on_all.by_files.values():
        report["facts"]["inputs"] = on_all.by_files[1]["facts"]["inputs"]
    assert diagnose(start_of(config, 2), evidence(**change)).code == 1
    assert diagnose(start_of(config, 2), on_all).code == 2
