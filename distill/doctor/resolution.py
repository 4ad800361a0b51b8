"""Names and addresses: each node finds rank 0's and its own, and announces one that the others can reach."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress

from distill.doctor.findings import Facts, Finding, Findings, Nodes
from distill.doctor.start import Start

SIOCGIFADDR = 0x8915


def look(start: Start) -> Facts:
    host = socket.gethostname()
    own = _resolve(host)
    return {
        "host": host,
        "own": own,
        "can_listen": _can_listen(own[0]) if own else False,
        "master": _resolve(start.address),
        "interfaces": {name: _address(name) for _, name in socket.if_nameindex()},
        "wanted": start.interfaces,
    }


def _resolve(name: str) -> list[str]:
    """The addresses of a name in their order; [] if it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _can_listen(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _address(interface: str) -> str | None:
    """An interface's IPv4 address."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, asked)[20:24])
    return None


def judge(start: Start, nodes: Nodes) -> Findings:
    several = len(nodes) > 1 or len(set(start.hosts)) > 1
    for number, (node, facts) in enumerate(nodes.items()):
        yield from _judge_interfaces(node, facts)
        if several:
            yield from _judge_own(node, facts)
        if start.world_size == 1:
            continue
        if not facts["master"]:
            fix = f"put its address into /etc/hosts of {node}, or give MASTER_ADDR as an address: export MASTER_ADDR=10.1.2.3"
            yield Finding(node, f"MASTER_ADDR {start.address} cannot be resolved here", fix)
        elif several and number > 0 and _is_loopback(facts["master"][0]):
            what = f"MASTER_ADDR {start.address} is {facts['master'][0]} here, which is {node} itself, not rank 0's node"
            first = next(iter(nodes.values()))
            fix = f"export MASTER_ADDR={first['host']}, and have {node} resolve it ({node}:/etc/hosts)"
            yield Finding(node, what, fix)


def _judge_interfaces(node: str, facts: Facts) -> Findings:
    there = facts["interfaces"]
    for variable, value in facts["wanted"].items():
        for name, by_beginning in _named(variable, value):
            if not any(each == name or (by_beginning and each.startswith(name)) for each in there):
                fix = f"export {variable}={_outward(facts) or 'NAME'} (there are {', '.join(there)})"
                yield Finding(node, f"{variable} names {name}, and there is no such interface", fix)


def _named(variable: str, value: str) -> list[tuple[str, bool]]:
    """The interfaces that a variable asks for, and whether a beginning will do, as in NCCL's without =; its ^ asks for none."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not variable.startswith("NCCL"):
        return [(part, False) for part in parts]
    if value.startswith("^"):
        return []
    exact = value.startswith("=")
    return [(part.removeprefix("="), not exact) for part in parts]


def _judge_own(node: str, facts: Facts) -> Findings:
    if "GLOO_SOCKET_IFNAME" in facts["wanted"]:
        return
    interface = _outward(facts) or "eth0"
    address = facts["interfaces"].get(interface) or "ADDRESS"
    fix = f"`{address} {facts['host']}` in /etc/hosts of {node}, or export GLOO_SOCKET_IFNAME={interface}"
    if not facts["own"]:
        yield Finding(node, f"its own name {facts['host']} cannot be resolved here", fix)
    elif _is_loopback(facts["own"][0]):
        what = f"its own name {facts['host']} is {facts['own'][0]} here, which it would announce to the other nodes"
        yield Finding(node, what, fix)
    elif not facts["can_listen"]:
        yield Finding(node, f"its own name {facts['host']} is {facts['own'][0]} here, which is no address of this node", fix)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _outward(facts: Facts) -> str | None:
    """An interface that other nodes may reach."""
    addresses = facts["interfaces"].items()
    return next((name for name, address in addresses if address and not _is_loopback(address)), None)


def note(facts: Facts) -> str:
    wanted = facts["wanted"].get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if wanted:
        return f"{wanted} ({facts['interfaces'].get(wanted)})"
    address = facts["own"][0] if facts["own"] else "127.0.0.1"
    interface = next((name for name, own in facts["interfaces"].items() if own == address), "no interface")
    return f"{facts['host']} = {address} ({interface})"
