"""From the reports, and from those that did not come, to findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from distill.doctor.checks import CHECKS, judge
from distill.doctor.findings import Facts, Finding, Findings, names
from distill.doctor.notices import Report
from distill.doctor.start import Start

REPORTS, NETWORK, STORAGE = "reports", "network", "storage"
OF_THE_CONFIG = ("inputs", "deepspeed")
TAKEN = ("EADDRINUSE", "address already in use")


@dataclass(frozen=True)
class Evidence:
    """What rank 0 has in hand at the end. Reports by rank; those without "facts" are of ranks that were still looking.

    waited: seconds that rank 0 waited for the others. network_error: why rank 0 itself could not go where ranks meet, '' if it
    could. by_network is empty where it had no torch to go there with.
    """

    by_files: Mapping[int, Report]
    by_network: Mapping[int, Report]
    waited: float = 0.0
    network_error: str = ""
    reduce_errors: Mapping[int, str] = field(default_factory=dict)
    bandwidth: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """notes: by node, then by check, of what is well. bandwidth: bytes a second; None where there was no all-reduce."""

    findings: tuple[Finding, ...]
    notes: dict[str, dict[str, str]]
    num_processes: int
    bandwidth: float | None

    @property
    def code(self) -> int:
        """The exit code. 2: the config asks for what no node has, so that other nodes, or a later start, are of no use."""
        faulty = {(finding.check, finding.node) for finding in self.findings if finding.is_fault}
        if self.notes and any(all((check, node) in faulty for node in self.notes) for check in OF_THE_CONFIG):
            return 2
        return 1 if faulty else 0


def diagnose(start: Start, evidence: Evidence) -> Diagnosis:
    reports = merged(evidence)
    labels = _labels(start, reports)
    looked = {labels[rank]: _facts(report) for rank, report in sorted(reports.items()) if report.get("facts")}
    findings = [*_judge_presence(start, evidence, labels), *_judge_network(start, evidence, labels), *judge(start, looked)]
    notes = {node: _notes(facts) for node, facts in looked.items()}
    for node in notes:
        if evidence.bandwidth is not None:
            notes[node][NETWORK] = f"{rate(evidence.bandwidth)} at {start.place}"
    for finding in findings:
        notes.setdefault(finding.node, {})
    return Diagnosis(tuple(dict.fromkeys(findings)), notes, start.world_size, evidence.bandwidth)


def merged(evidence: Evidence) -> dict[int, Report]:
    """What is known of each rank, by either way."""
    ranks = evidence.by_files.keys() | evidence.by_network.keys()
    return {rank: {**evidence.by_network.get(rank, {}), **evidence.by_files.get(rank, {})} for rank in sorted(ranks)}


def _labels(start: Start, reports: Mapping[int, Report]) -> dict[int, str]:
    """A name for each rank's node: its host, told from another of the same name by the rank that examined it."""
    labels = {}
    examiners: dict[str, int] = {}
    for rank in range(start.world_size):
        report = reports.get(rank)
        if report is None:
            labels[rank] = start.hosts[rank] if rank < len(start.hosts) else f"rank {rank}"
            continue
        host = report["host"]
        is_another = report["local_rank"] == 0 and host in examiners
        labels[rank] = f"{host} (rank {rank})" if is_another else host
        if report["local_rank"] == 0:
            examiners.setdefault(host, rank)
    return labels


def _facts(report: Report) -> dict[str, Facts]:
    facts = dict(report["facts"])
    if "is_locked" in report and "failed" not in facts["storage"]:
        facts["storage"] = facts["storage"] | {"is_locked": report["is_locked"]}
    return facts


def _judge_presence(start: Start, evidence: Evidence, labels: Mapping[int, str]) -> Findings:
    """Who has not reported over the run directory, where rank 0 itself can write to it."""
    first = evidence.by_files[0]
    is_writable = not storage_error(first)
    said = set()
    for rank in range(1, start.world_size):
        node, report = labels[rank], evidence.by_network.get(rank)
        if "facts" in evidence.by_files.get(rank, {}) or node in said:
            continue
        said.add(node)
        within = f"within {evidence.waited:.0f} s"
        if rank in evidence.by_files and report is not None:
            continue
        if rank in evidence.by_files:
            what = f"rank {rank} has begun, but has not reported {within}: it hangs, or is very slow"
            yield Finding(node, what, f"ssh {node} uptime; or leave it out: sbatch --exclude {node}", check=REPORTS)
        elif report is None:
            away = f"it does not see the run directory {start.config.run_dir} (another file system?)" if is_writable else ""
            began = "its process did not start"
            ways = f", nor come to {start.place}" if evidence.by_network and not evidence.network_error else ""
            what = f"has not reported {within}{ways}: {f'{away}, or {began}' if away else began}"
            fix = "see its own lines in the log"
            if rank < len(start.hosts):
                fix = f"ssh {node} ls -d {start.config.run_dir.absolute()}; {fix}; or leave it out: sbatch --exclude {node}"
            yield Finding(node, what, fix, check=REPORTS)
        elif is_writable and not storage_error(report):
            kinds = {labels[0]: _kind(first), node: _kind(report)}
            mounted = ", ".join(f"{kind} on {each}" for each, kind in kinds.items())
            what = f"it does not see the run directory that {labels[0]} sees: {start.config.run_dir.absolute()} is {mounted}"
            fix = f"mount the same file system on {node}, or runs_dir=DIR on one that all nodes see"
            yield Finding(node, what, fix, check=STORAGE)


def storage_error(report: Report) -> str:
    facts = report.get("facts", {}).get("storage", {})
    return facts.get("failed") or facts.get("error", "")


def _kind(report: Report) -> str:
    return report.get("facts", {}).get("storage", {}).get("kind", "unknown")


def _judge_network(start: Start, evidence: Evidence, labels: Mapping[int, str]) -> Findings:
    if not evidence.by_network or start.world_size == 1:
        return
    if evidence.network_error:
        what = f"rank 0 cannot serve {start.place}: {evidence.network_error}"
        fix = f"is MASTER_ADDR {start.address} an address of {labels[0]}? else export MASTER_ADDR={labels[0]}"
        if any(sign in evidence.network_error for sign in TAKEN):
            what = f"port {start.port} is in use on {labels[0]} by another process"
            fix = (
                f"ssh {labels[0]} ss -ltnp sport = :{start.port}, and end that process; or export MASTER_PORT={start.port + 1}"
            )
        yield Finding(labels[0], what, fix, check=NETWORK)
        return
    absent = [rank for rank in range(start.world_size) if rank not in evidence.by_network and rank in evidence.by_files]
    for rank in absent:
        report = evidence.by_files[rank]
        if report.get("is_late", True):  # it has no torch yet to come with
            continue
        why = f" ({report['network_error']})" if report.get("network_error") else ""
        what = (
            f"rank {rank} reports over the run directory, but has not come to {start.place} within {evidence.waited:.0f} s{why}"
        )
        fix = f"ssh {report['host']} nc -vz {start.address} {start.port}; open all ports between nodes (firewall, cable)"
        yield Finding(labels[rank], what, fix, check=NETWORK)
    for errors in _by_error(evidence.reduce_errors):
        nodes = names(dict.fromkeys(labels[rank] for rank in errors))
        what = f"all ranks came to {start.place}, but the all-reduce failed on {nodes}: {evidence.reduce_errors[errors[0]]}"
        fix = "open all ports between nodes, and name their interface: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        yield Finding(labels[errors[0]], what, fix, check=NETWORK)


def _by_error(errors: Mapping[int, str]) -> list[list[int]]:
    """The ranks of each error."""
    return [[rank for rank in sorted(errors) if errors[rank] == error] for error in dict.fromkeys(errors.values())]


def _notes(facts: Mapping[str, Facts]) -> dict[str, str]:
    return {check.name: check.note(facts[check.name]) for check in CHECKS if "failed" not in facts[check.name]}


def rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.1f} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:.0f} MB/s"
