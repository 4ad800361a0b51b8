"""Each fault is found on its node; healthy nodes have no findings. No processes: facts in, findings out."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from conftest import write_config
from facts import HEALTHY, context_of, diagnosis_of, reports

from distill.doctor import diagnosis as diagnosis_module
from distill.doctor.diagnosis import CHECKS, diagnose
from distill.doctor.rendezvous import AllReduce

H100, A100 = ["NVIDIA H100", 80], ["NVIDIA A100", 40]


@pytest.fixture
def config(tmp_path, tiny_encoder):
    return write_config(tmp_path, tiny_encoder)


def located(diagnosis):
    return [(each.check, each.node, each.is_fault) for each in diagnosis.findings]


@pytest.mark.parametrize("num_nodes", [1, 2, 64])
def test_healthy_nodes_that_are_alike_have_no_findings(config, num_nodes):
    diagnosis = diagnosis_of(config, reports(num_nodes))
    assert diagnosis.findings == () and diagnosis.code == 0
    assert list(diagnosis.nodes) == [f"n{number + 1}" for number in range(num_nodes)]


PACKAGES = HEALTHY["software"]["packages"]
FAULTS = {
    "python": ({"software": {"python": "3.11"}}, "Python is 3.11 here, 3.12 on n1"),
    "package": ({"software": {"packages": PACKAGES | {"numpy": "1.26.4"}}}, "numpy is 1.26.4 here, 2.4.6 on n1"),
    "no package": ({"software": {"packages": PACKAGES | {"torch": None}}}, "torch is missing here, 2.13.0 on n1"),
    "code": ({"software": {"code": {"distill/config.py": "aa", "launcher/train.py": "zz"}}}, "of n1: launcher/train.py"),
    "config": ({"software": {"config": "dd"}}, "the config is not the same as on n1"),
    "import": ({"deepspeed": {"error": "ImportError: libfoo"}}, "DeepSpeed does not import: ImportError: libfoo"),
    "settings": ({"deepspeed": {"settings_error": "no DeepSpeed configuration at x"}}, "no DeepSpeed configuration at x"),
    "number of gpus": ({"devices": {"gpus": [H100, H100]}}, "2 x NVIDIA H100 80 GiB here, no GPU on n1"),
    "driver": ({"devices": {"driver": "550.1", "gpus": []}}, "the GPU driver is 550.1 here, None on n1"),
    "bf16": ({"devices": {"bf16": False}}, "no bf16 here, but on n1"),
    "own name": ({"names": {"addresses": []}}, "its own name n2 cannot be resolved"),
    "loopback": ({"names": {"addresses": ["127.0.1.1"]}}, "its own name n2 is 127.0.1.1 here"),
    "foreign address": ({"names": {"addresses": ["10.9.9.9"]}}, "10.9.9.9 here, which is no address"),
    "master": ({"names": {"master": []}}, "MASTER_ADDR n1 cannot be resolved here"),
    "master is loopback": ({"names": {"master": ["127.0.0.1"]}}, "MASTER_ADDR n1 is 127.0.0.1 here"),
    "gloo interface": ({"names": {"named_interfaces": {"GLOO_SOCKET_IFNAME": "ib7"}}}, "GLOO_SOCKET_IFNAME names ib7"),
    "nccl interface": ({"names": {"named_interfaces": {"NCCL_SOCKET_IFNAME": "=et"}}}, "NCCL_SOCKET_IFNAME names et"),
    "read-only": ({"storage": {"error": "Read-only file system", "errno": errno.EROFS}}, "cannot be written here: Read-only"),
    "no locks": ({"storage": {"lock": "flock is refused: Function not implemented"}}, "flock is refused"),
    "local locks": ({"storage": {"is_locked": False}}, "a lock that rank 0 holds is free here"),
    "other file system": ({"storage": {"is_shared": False, "kind": "tmpfs none"}}, "server:/shared on n1, tmpfs none on n2"),
    "shm": ({"shm": {"free": 0}}, "/dev/shm is full"),
    "model": ({"inputs": {"errors": {"teacher.model": "no model at /m"}}}, "teacher.model: no model at /m"),
    "other text": ({"inputs": {"sizes": {"text.txt": 7}}}, "text.txt is not the same as on n1: 7 bytes here, 1,000 there"),
    "hub": ({"inputs": {"hub": {"teacher.model": "a/b"}, "offline": True}}, "a/b is not in this node's cache"),
    "hangs": ({"inputs": {"failed": "not done after 33 s", "cause": "time"}}, "the check failed: not done after 33 s"),
    "raises": ({"shm": {"failed": "KeyError: 'x'", "cause": "error"}}, "the check shm raised KeyError: 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_on_its_node(config, name):
    change, words = FAULTS[name]
    diagnosis = diagnosis_of(config, reports(2, **change), "engine.precision=auto")
    faults = [each for each in diagnosis.findings if each.is_fault]
    assert [(each.check, each.node) for each in faults] == [(next(iter(change)), "n2")]
    assert words in faults[0].what and faults[0].fix
    assert diagnosis.code == 1


def test_an_error_in_a_check_is_reported_as_that_check_s_and_hides_no_other_finding(config, monkeypatch):
    def broken(context, nodes):
        raise KeyError("gone")
        yield

    changed = [replace(check, diagnose=broken) if check.name == "clocks" else check for check in CHECKS]
    monkeypatch.setattr(diagnosis_module, "CHECKS", changed)
    diagnosis = diagnosis_of(config, reports(2, shm={"free": 0}))
    assert located(diagnosis) == [("shm", "n2", True), ("clocks", "n1", True)]
    assert diagnosis.findings[1].what == "the check clocks raised KeyError: 'gone'"
    assert "file system" not in diagnosis.findings[1].fix


WARNINGS = {
    "threads": ({"devices": {"threads": 16}}, "2 ranks x 16 threads"),
    "no threads": ({"devices": {"threads": None}}, "OMP_NUM_THREADS is not set"),
    "little shm": ({"shm": {"free": 100_000_000}}, "/dev/shm has 100 MB free, less than 64 MB for each of 2 ranks"),
    "behind": ({"clocks": {"ahead": -3600.0}}, "3,600 s behind"),
    "ahead": ({"clocks": {"ahead": 11.0}}, "11 s ahead of"),
    "files": ({"limits": {"files": 256}}, "may open 256 files"),
    "locked": ({"limits": {"locked": 65536, "has_gpus": True}}, "may lock 65.5 kB"),
    "memory": ({"deepspeed": {"needed": 9e9}}, "need 9 GB, and the node has 8 GB"),
    "download": ({"inputs": {"hub": {"teacher.model": "a/b"}}}, "would be downloaded"),
    "slow import": ({"deepspeed": {"failed": "not done after 33 s", "cause": "import"}}, "`import deepspeed` is not done"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_reported_on_its_node_and_is_no_fault(config, name):
    change, words = WARNINGS[name]
    diagnosis = diagnosis_of(config, reports(2, **change))
    assert located(diagnosis) == [(next(iter(change)), "n2", False)]
    assert words in diagnosis.findings[0].what and diagnosis.findings[0].fix
    assert diagnosis.code == 0


FINE = {
    "loopback, with an interface": {"names": {"addresses": ["127.0.1.1"], "named_interfaces": {"GLOO_SOCKET_IFNAME": "eth0"}}},
    "NCCL's interfaces by a prefix": {"names": {"named_interfaces": {"NCCL_SOCKET_IFNAME": "eth"}}},
    "NCCL's excluded interfaces": {"names": {"named_interfaces": {"NCCL_SOCKET_IFNAME": "^docker"}}},
    "clocks": {"clocks": {"ahead": 5.0}},
    "no clock": {"clocks": {"ahead": None}},
}


@pytest.mark.parametrize("name", FINE)
def test_what_does_no_harm_is_no_finding(config, name):
    assert located(diagnosis_of(config, reports(2, **FINE[name]))) == []


def test_mixed_processors_are_fine_with_a_precision_that_all_have(config):
    mixed = reports(2, devices={"bf16": False})
    assert located(diagnosis_of(config, mixed, "engine.precision=fp32")) == []
    assert located(diagnosis_of(config, mixed, "engine.precision=bf16")) == [("devices", "n2", True)]


def test_more_ranks_than_gpus(config):
    both = reports(2, devices={"gpus": [A100]})
    both[0]["facts"]["devices"]["gpus"] = [A100]
    assert located(diagnosis_of(config, both)) == [("devices", "n1", True), ("devices", "n2", True)]


def test_the_node_that_differs_from_most_is_reported_and_not_rank_0(config):
    many = reports(8)
    many[0]["facts"]["software"]["python"] = "3.11"
    assert located(diagnosis_of(config, many)) == [("software", "n1", True)]


@pytest.mark.parametrize(
    "storage, expected",
    [
        ({"free": 900_000_000}, [("storage", "n1", True)]),
        ({"free": 900_000_000, "needed": None, "estimate": "not known"}, [("storage", "n1", False)]),
        ({"free": 2_000_000_000, "needed": None, "estimate": "not known"}, []),
    ],
)
def test_space_for_the_run_is_checked_once(config, storage, expected):
    both = reports(2, storage=storage)
    both[0]["facts"]["storage"] |= storage
    assert located(diagnosis_of(config, both)) == expected


def test_a_node_that_did_not_come_is_reported_once_with_its_ranks(config):
    three = reports(3)
    context = context_of(config, 4, hosts=("n1", "n2", "n2", "n3"))
    (only,) = diagnose(context, {0: three[0], 3: three[2]}, waited=14.0).findings
    assert (only.check, only.node, only.is_fault) == ("rendezvous", "n2", True)
    assert only.what.startswith("rank 1, 2 did not come to n1:29500 within 14 s") and "not started" in only.what


def test_rank_0_that_cannot_serve_the_store_does_not_blame_the_others(config):
    own = {0: reports(1)[0]}
    (only,) = diagnose(
        context_of(config), own, "server socket: 29500, name: EADDRINUSE, message: address already in use"
    ).findings
    assert (only.check, only.node) == ("rendezvous", "n1") and "port 29500 is in use on n1" in only.what
    (only,) = diagnose(context_of(config), own, "no route to host").findings
    assert (only.check, only.node) == ("rendezvous", "n1") and "rank 0 cannot serve n1:29500: no route to host" in only.what


def test_a_rank_that_does_not_reach_rank_0_diagnoses_its_own_node(config):
    own = {1: reports(2, names={"master": ["127.0.0.1"]}, shm={"free": 0})[1]}
    diagnosis = diagnose(context_of(config, rank=1, hosts=()), own, "no answer")
    assert located(diagnosis) == [("rendezvous", "n2", True), ("names", "n2", True), ("shm", "n2", True)]
    assert diagnosis.findings[0].what == "rank 1 did not reach rank 0 at n1:29500: no answer" and diagnosis.code == 1
    assert "MASTER_ADDR n1 is 127.0.0.1 here, which is n2 itself" in diagnosis.findings[1].what


def test_ranks_of_one_machine_may_use_its_loopback_address(config):
    both = reports(1)
    both[0]["facts"]["names"] |= {"addresses": ["127.0.1.1"], "master": ["127.0.1.1"]}
    both[1] = {"host": "n1", "local_rank": 1, "facts": {}}
    assert diagnose(context_of(config, local_world_size=2), both).findings == ()


def test_an_all_reduce_that_fails_is_reported_once_per_error(config):
    failed = AllReduce({1: "refused", 2: "refused", 3: "no result"})
    findings = diagnose(context_of(config, 4), reports(4), reduced=failed).findings
    assert [(each.check, each.node) for each in findings] == [("network", "n2"), ("network", "n4")]
    assert "the all-reduce failed on n2, n3: refused" in findings[0].what


def test_two_nodes_of_one_host_name_are_two(config):
    both = reports(2)
    both[1]["host"] = "n1"
    assert diagnosis_of(config, both).nodes == ("n1", "n1 (rank 1)")


def test_the_exit_code_tells_what_no_node_has_from_what_one_lacks(config):
    change = {"inputs": {"errors": {"teacher.model": "no model at /m"}}}
    both = reports(2, **change)
    assert diagnosis_of(config, both).code == 1
    both[0]["facts"]["inputs"] = both[1]["facts"]["inputs"]
    assert diagnosis_of(config, both).code == 2
    assert diagnose(context_of(config), {0: both[0]}, "no answer").code == 1  # what the other node has is not known


@pytest.mark.parametrize(
    "failed", [{"failed": "not done after 33 s", "cause": "time"}, {"failed": "OSError", "cause": "error"}]
)
@pytest.mark.parametrize("check", ["inputs", "deepspeed"])
def test_a_check_that_fails_on_all_nodes_is_not_final(config, check, failed):
    both = reports(2, **{check: failed})
    both[0]["facts"][check] |= failed
    assert diagnosis_of(config, both).code == 1
