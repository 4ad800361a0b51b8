"""Tables of what a run was made from and what it cost: from DONE.json, sessions.jsonl, tasks.jsonl and text/manifest.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from distill.config import TRAINING_STAGES, RunConfig
from distill.export.card import public
from distill.report.charts import Chart
from distill.report.result_tables import TIMES, Table
from distill.run.files import read_json, read_lines
from distill.run.formatting import format_duration
from distill.run.session_log import read_sessions

STATUS = {
    "kept": "kept, and embedded for training",
    "held_out": "held out for evaluation, never trained on",
    "held_out_unused": "held out, not needed",
    "duplicates": "dropped: the same as an earlier text",
    "too_short": "dropped: too short",
    "too_long": "dropped: too long",
    "not_sampled": "not sampled (text.max_sentences)",
}
TASK_COLUMNS = {  # key, format, and factor of the value
    "texts": ("texts", "{:,}", 1),
    "texts per second": ("texts_per_second", "{:,.0f}", 1),
    "real tokens of padded": ("padding_efficiency", "{:.1f}%", 100),
    "TFLOP/s": ("flops_per_second", "{:,.2f}", 1e-12),
    "of the device's matrix product": ("mfu", "{:.0f}%", 100),
}
MAX_TASKS = 20  # rows of the table of precompute tasks
Record = Mapping[str, Any]


def stage_results(config: RunConfig, stage: str) -> dict[str, Any]:
    """The results of a stage's DONE.json; empty where it is not finished."""
    return (read_json(config.stage_of(stage).directory / "DONE.json") or {}).get("results", {})


def sessions_of(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """The sessions of each stage of the run."""
    return {stage: read_sessions(config.stage_of(stage).directory) for stage in config.stages}


def cost_table(config: RunConfig) -> Table:
    """Devices, wall clock, device time and energy of each stage that has been worked at, and their sums."""
    rows, total = [], 0.0
    sessions = sessions_of(config)
    for stage, of_stage in sessions.items():
        seconds = _covered_seconds(of_stage) if of_stage else None
        if stage in TRAINING_STAGES:  # it counts its own seconds, also those of sessions that were killed
            seconds = stage_results(config, stage).get("seconds", seconds)
        if seconds is not None:
            devices = dict.fromkeys(f"{each['ranks']} {TIMES} {each['device']}" for each in of_stage)
            rows.append([stage, ", ".join(devices) or "-", format_duration(seconds), *_usage(of_stage)])
            total += seconds
    rows.append(["all stages", "", format_duration(total), *_usage([*chain.from_iterable(sessions.values())])])
    return Table("By stage", ["stage", "devices", "wall clock", f"ranks {TIMES} time", "GPU energy"], rows, num_left=2)


def _usage(sessions: Sequence[Record]) -> tuple[str, str]:
    """Device time and energy; "-" for what was not recorded in every session."""
    if not sessions:
        return "-", "-"
    joules = [session["gpu_joules"] for session in sessions if session.get("gpu_joules") is not None]
    energy = f"{sum(joules) / 3600:,.2f} Wh" if len(joules) == len(sessions) else "-"
    return format_duration(sum(session["ranks"] * session["seconds"] for session in sessions)), energy


def _covered_seconds(sessions: Sequence[Record]) -> float:
    """Seconds in which at least one of the sessions ran."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted((session["started"], session["started"] + session["seconds"]) for session in sessions):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def task_table(config: RunConfig) -> Table | None:
    """precompute/tasks.jsonl: what each task embedded, and how fast; None where no task has been recorded."""
    tasks = read_lines(config.precompute_dir / "tasks.jsonl")
    rows = []
    for task in tasks[:MAX_TASKS]:
        values = [(form, task.get(key), factor) for key, form, factor in TASK_COLUMNS.values()]
        rows.append([task["host"], *(form.format(value * factor) if value else "-" for form, value, factor in values)])
    more = f", the first {MAX_TASKS} of {len(tasks)}" if len(tasks) > MAX_TASKS else ""
    return Table(f"Embedding, task by task{more}", ["host", *TASK_COLUMNS], rows) if rows else None


def source_table(text: Record) -> Table:
    """Name, type and number of texts read of each source."""
    rows = []
    for source in text["sources"]:
        name = public(source.get("path") or source.get("name") or "this machine's packages")
        more = [f"{key} {source[key]}" for key in ("subset", "field", "revision", "limit") if source.get(key) is not None]
        rows.append([", ".join([name, *more]), source["type"], f"{source['count']:,}"])
    return Table("Sources", ["source", "type", "texts read"], rows, num_left=2)


def status_table(text: Record) -> Table:
    """How many of the texts read were kept, held out and dropped."""
    counts = {name: text["counts"][name] for name in (*STATUS, *text["counts"]) if text["counts"].get(name)}
    total = counts.pop("read", 0)
    rows = [[STATUS.get(name, name), f"{count:,}", f"{count / (total or 1):.1%}"] for name, count in counts.items()]
    return Table(f"Status of {total:,} texts", ["status", "texts", "percentage"], rows)


def lengths_chart(text: Record) -> Chart | None:
    """The histogram of the lengths of the texts kept; None where the manifest has none."""
    histogram = text["lengths"].get("histogram")
    if histogram is None:
        return None
    edges = [histogram["from"] - 1, *histogram["upto"]]
    bars = list(zip(edges, edges[1:], histogram["counts"], strict=False))
    return Chart("Lengths of the texts kept", "characters", "texts", bars=bars)


def version_table(config: RunConfig) -> Table | None:
    """Each version of a package, with the stages that ran with it where there are several; None without sessions."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for stage, sessions in sessions_of(config).items():
        for name, version in (item for session in sessions for item in session["versions"].items()):
            found.setdefault(name, {}).setdefault(version, {})[stage] = None
    rows = []
    for name, versions in found.items():
        several = [f"{version} ({', '.join(stages)})" for version, stages in versions.items()]
        rows.append([name, ", ".join(several if len(versions) > 1 else versions)])
    return Table("What the stages ran with", ["software", "version"], rows, num_left=2) if rows else None
