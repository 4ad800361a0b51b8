"""What a run was made from, what it cost and how it is made again: from the files of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.config import TRAINING_STAGES, RunConfig
from distill.export.card import public
from distill.report.chart import Axis, Chart
from distill.sessions import read_lines, read_sessions
from distill.stages import read_json, stage_of

FATES = {
    "kept": "kept, and embedded for training",
    "held_out": "held out for evaluation, never trained on",
    "held_out_unused": "held out, not needed",
    "duplicates": "dropped: the same as one before",
    "too_short": "dropped: too short",
    "too_long": "dropped: too long",
    "not_sampled": "not drawn (text.max_sentences)",
}
NOT_TOLD = "not told by the device"
NOT_RECORDED = "not recorded"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """A line of the cost table. seconds: wall clock; device_seconds: of all ranks and tasks together."""

    stage: str
    devices: str
    seconds: float | None
    device_seconds: float | None
    joules: Mapping[str, float]

    @property
    def energy(self) -> str:
        named = {"gpu": "GPU", "cpu": "processor"}
        if not self.joules:
            return NOT_TOLD if self.device_seconds is not None else NOT_RECORDED
        return ", ".join(f"{watt_hours(value)} ({named[kind]})" for kind, value in sorted(self.joules.items(), reverse=True))


def directory_of(config: RunConfig, stage: str) -> Path:
    return config.precompute_dir if stage == "precompute" else config.run_dir / stage


def sessions_of(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """The sessions of each stage of the run."""
    return {stage: read_sessions(directory_of(config, stage)) for stage in config.stages}


def costs(config: RunConfig) -> list[Cost]:
    """A line for each stage that has been worked at, and their sum."""
    lines = []
    for stage, sessions in sessions_of(config).items():
        results = (read_json(directory_of(config, stage) / "DONE.json") or {}).get("results", {})
        # a training stage counts its own seconds, through kills too
        seconds = results["seconds"] if stage in TRAINING_STAGES and "seconds" in results else _covered(sessions)
        if sessions or seconds is not None:
            devices = dict.fromkeys(f"{_times(session['ranks'])}{session['device']}" for session in sessions)
            of_all = sum(session["ranks"] * session["seconds"] for session in sessions) if sessions else None
            lines.append(Cost(stage, ", ".join(devices) or NOT_RECORDED, seconds, of_all, _joules(sessions)))
    sessions = [session for found in sessions_of(config).values() for session in found]
    whole = [line.device_seconds for line in lines if line.device_seconds is not None]
    seconds = [line.seconds for line in lines if line.seconds is not None]
    lines.append(Cost("all stages", "", sum(seconds), sum(whole) if whole else None, _joules(sessions)))
    return lines


def _joules(sessions: Iterable[Record]) -> dict[str, float]:
    """The sum by kind, of the kinds that every session tells."""
    told = [session["joules"] for session in sessions]
    kinds = set.intersection(*(set(joules) for joules in told)) if told else set()
    return {kind: sum(joules[kind] for joules in told) for kind in kinds}


def _covered(sessions: Sequence[Record]) -> float | None:
    """Seconds in which any of the sessions was at work; None if there was none."""
    if not sessions:
        return None
    covered, until = 0.0, float("-inf")
    for begun, ended in sorted((session["started"], session["started"] + session["seconds"]) for session in sessions):
        covered += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return covered


def _times(ranks: int) -> str:
    return f"{ranks} \N{MULTIPLICATION SIGN} " if ranks > 1 else ""


def encoding_tasks(config: RunConfig) -> list[dict[str, Any]]:
    """precompute/tasks.jsonl: what each task embedded, and how near it came to what the device can do."""
    return read_lines(config.precompute_dir / "tasks.jsonl")


def fates(text: Record) -> list[tuple[str, int, float]]:
    """What became of the raw sentences: in words, how many, which share of all."""
    counts = text["counts"]
    known = {**{name: FATES[name] for name in FATES if name in counts}, **{name: name for name in counts if name not in FATES}}
    total = counts.get("read") or 1
    return [(words, counts[name], counts[name] / total) for name, words in known.items() if name != "read" and counts[name]]


def sources(text: Record) -> list[tuple[str, str, int]]:
    """Type, name and raw sentences read of each source."""
    found = []
    for source in text["sources"]:
        name = public(source.get("path") or source.get("name") or "this machine's packages")
        more = [f"{key} {source[key]}" for key in ("subset", "field", "revision", "limit") if source.get(key) is not None]
        found.append((source["type"], ", ".join([name, *more]), source["count"]))
    return found


def lengths_chart(text: Record) -> Chart | None:
    histogram = text["lengths"].get("histogram")
    if histogram is None:  # of a text that was cut before there were histograms
        return None
    edges = [histogram["from"] - 1, *histogram["upto"]]
    bars = [(low, high, number) for low, high, number in zip(edges, edges[1:], histogram["counts"], strict=False)]
    return Chart("Lengths of the sentences kept", Axis("characters", zero=True), Axis("sentences", zero=True), bars=bars)


def versions(config: RunConfig) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name by name, each version with the stages that ran with it."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, sessions in sessions_of(config).items():
        for session in sessions:
            for name, version in session["versions"].items():
                stages = found.setdefault(name, {}).setdefault(version, [])
                if stage not in stages:
                    stages.append(stage)
    return [
        (name, [(version, "" if len(of_name) == 1 else ", ".join(stages)) for version, stages in of_name.items()])
        for name, of_name in found.items()
    ]


def short_config(config: RunConfig) -> str:
    """The YAML of what differs from the defaults: `load_config` of it gives an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def strays(config: RunConfig) -> list[str]:
    """Stages that were made from another config than the one that lies in the run directory, and how it differs."""
    found = []
    for name in config.stages:
        done = read_json(directory_of(config, name) / "DONE.json")
        if done is not None and (changes := stage_of(config, name).changes_since(done)):
            found.append(f"{name}: {'; '.join(changes)}")
    return found


def watt_hours(joules: float) -> str:
    hours = joules / 3600
    return f"{hours / 1000:,.1f} kWh" if hours >= 1000 else f"{hours:,.2f} Wh"


def duration(seconds: float | None) -> str:
    """Of a number of seconds: 12.3 s, 4 min 05 s, 3 h 07 min."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
