"""Names and addresses: each node resolves MASTER_ADDR and its own name, to an address that the others can reach."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from distill.doctor.check import Context, Facts, Finding, Findings, Nodes


def collect(context: Context) -> Facts:
    host, ip = socket.gethostname(), (socket.AF_INET, socket.AF_INET6)
    interfaces = {name: [e.address for e in entries if e.family in ip] for name, entries in psutil.net_if_addrs().items()}
    facts: Facts = {"host": host, "addresses": _resolve(host), "master": _resolve(context.master_addr)}
    named = context.interfaces.get("GLOO_SOCKET_IFNAME")
    summary = f"interface {named}" if named else f"{host} = {next(iter(facts['addresses']), 'no address')}"
    return facts | {"interfaces": interfaces, "named_interfaces": context.interfaces, "summary": summary}


def _resolve(name: str) -> list[str]:
    """The addresses of a name in their order; [] if it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def diagnose(context: Context, nodes: Nodes) -> Findings:
    for number, (node, facts) in enumerate(nodes.items()):
        yield from _diagnose_interfaces(node, facts)
        if context.has_several_nodes:
            yield from _diagnose_host(node, facts)
        if context.world_size == 1:
            continue
        if not facts["master"]:
            fix = f"put its address into /etc/hosts of {node}, or give MASTER_ADDR as an address: export MASTER_ADDR=10.1.2.3"
            yield Finding(node, f"MASTER_ADDR {context.master_addr} cannot be resolved here", fix)
        elif context.has_several_nodes and context.rank + number > 0 and _is_loopback(facts["master"][0]):
            what = f"MASTER_ADDR {context.master_addr} is {facts['master'][0]} here, which is {node} itself, not rank 0's node"
            fix = f"put rank 0's address for it into /etc/hosts of {node}, or export MASTER_ADDR as an address"
            yield Finding(node, what, fix)


def _diagnose_interfaces(node: str, facts: Facts) -> Findings:
    """NCCL takes its names for prefixes unless they begin with =, and excludes those after ^."""
    existing = list(facts["interfaces"])
    for variable, value in facts["named_interfaces"].items():
        is_prefix = variable.startswith("NCCL") and not value.startswith("=")
        for name in filter(None, value.removeprefix("=").split(",")) if not value.startswith("^") else ():
            if not any(each == name or (is_prefix and each.startswith(name)) for each in existing):
                fix = f"export {variable}={_outward(facts)[0]} (there are {', '.join(existing)})"
                yield Finding(node, f"{variable} names {name}, and there is no such interface", fix)


def _diagnose_host(node: str, facts: Facts) -> Findings:
    if "GLOO_SOCKET_IFNAME" in facts["named_interfaces"]:
        return
    own, address = f"its own name {facts['host']}", next(iter(facts["addresses"]), None)
    interface, outward = _outward(facts)
    fix = f"`{outward} {facts['host']}` in /etc/hosts of {node}, or export GLOO_SOCKET_IFNAME={interface}"
    if address is None:
        yield Finding(node, f"{own} cannot be resolved here", fix)
    elif _is_loopback(address):
        yield Finding(node, f"{own} is {address} here, which it would announce to the other nodes", fix)
    elif not any(address in addresses for addresses in facts["interfaces"].values()):
        yield Finding(node, f"{own} is {address} here, which is no address of this node", fix)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _outward(facts: Facts) -> tuple[str, str]:
    """An interface that other nodes may reach, and its address; where there is none, names to be replaced."""
    pairs = ((name, addresses[0]) for name, addresses in facts["interfaces"].items() if addresses)
    return next(((name, address) for name, address in pairs if not _is_loopback(address)), ("NAME", "ADDRESS"))
