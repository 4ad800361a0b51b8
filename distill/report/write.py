"""One page of a run, report.html: the template filled with what the other modules of this package read."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.config import RunConfig, dump_config
from distill.export.card import NAMES, public
from distill.files import publish
from distill.report import quality, run
from distill.report.chart import Axis, Chart
from distill.report.curves import read_curves, stage_charts
from distill.stages import read_json, trained_stages

HERE = Path(__file__).parent
MOST_CHARACTERS = 400  # of a sentence that is shown


def write_report(config: RunConfig) -> Path:
    """Writes <run>/report.html from the run's files, and returns where it is. Raises ValueError if it is not evaluated yet."""
    results = read_json(config.run_dir / "evaluate" / "results.json")
    if results is None:
        raise ValueError(f"{config.run_dir} has no evaluate/results.json to report: run its evaluate stage first")
    results = dict(sorted(results.items(), key=lambda row: _place(config, *row)))  # the file has them by their names
    path = config.run_dir / "report.html"
    page = _environment().get_template("page.html").render(_facts(config, results))
    with publish(path) as file:
        file.write(page.encode())
    return path


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"duration": run.duration, "shortened": _shortened}
    return made


def _facts(config: RunConfig, results: dict[str, Any]) -> dict[str, Any]:
    """Everything that the template shows."""
    text = read_json(config.precompute_dir / "text" / "manifest.json")
    students = [name for name in trained_stages(config) if name in results]
    neighbours = read_json(config.run_dir / "evaluate" / "neighbours.json")
    sessions = run.sessions_of(config)
    recipe = run.short_config(config)
    return {
        "name": config.name,
        "style": Markup((HERE / "style.css").read_text(encoding="utf-8")),  # safe: our own file
        "teachers": [public(model.model or config.teacher.vectors or "") for model in config.teacher.models],
        "student": students[-1] if students else None,
        "method": NAMES[students[-1]] if students else "",
        "measured_on": _date(sessions.get("evaluate", [])),
        "tiles": quality.headline(results, students[-1]) if students else [],
        "results": quality.result_table(results),
        "averaged": next((row["sts"]["AVG_OF"] for row in results.values() if row.get("sts")), []),
        "fidelity_on": max((row.get("fidelity", {}).get("sentences", 0) for row in results.values()), default=0),
        "warnings": _warnings(results),
        "sets": quality.sets_table(results),
        "details": quality.detail_tables(results),
        "quality_charts": quality.quality_charts(results) + quality.small_vector_charts(results),
        "stages": _stages(config),
        "neighbours": neighbours,
        "shared_chart": _shared_chart(neighbours) if neighbours else None,
        "text": text,
        "sources": run.sources(text) if text else [],
        "fates": run.fates(text) if text else [],
        "lengths_chart": run.lengths_chart(text) if text else None,
        "precompute": (read_json(config.precompute_dir / "DONE.json") or {}).get("results"),
        "costs": run.costs(config),
        "tasks": run.encoding_tasks(config),
        "versions": run.versions(config),
        "recipe": recipe,
        "recipe_link": "data:text/yaml;charset=utf-8," + quote(recipe),
        "config": dump_config(config),
        "strays": run.strays(config),
        "run_dir": config.run_dir,
        "quoted": shlex.quote,
    }


def _place(config: RunConfig, name: str, row: dict[str, Any]) -> tuple[int, int]:
    """Where a model stands: the teacher, then the stages in their order, each with its nested sizes from large to small."""
    stages = [quality.TEACHER, *trained_stages(config)]
    stage = name if name in stages else name.rpartition("-")[0]
    return stages.index(stage) if stage in stages else len(stages), -row["dim"]


def _stages(config: RunConfig) -> list[dict[str, Any]]:
    """Name, method, results of DONE.json and charts of each training stage that left something to show."""
    found = []
    for name in trained_stages(config):
        results = (read_json(config.run_dir / name / "DONE.json") or {}).get("results", {})
        charts = stage_charts(name, read_curves(config.run_dir / "tensorboard" / name), results)
        if results or charts:
            found.append({"name": name, "method": NAMES[name], "results": results, "charts": charts})
    return found


def _warnings(results: dict[str, Any]) -> list[str]:
    """Of the sets that were measured; which were not can be seen from what the average is of."""
    found = [(row["sts"], warning) for row in results.values() for warning in row.get("sts_warnings", [])]
    return list(dict.fromkeys(warning for sets, warning in found if warning.split()[0] in sets))


def _shared_chart(neighbours: dict[str, Any]) -> Chart:
    bars = [(number - 0.5, number + 0.5, count) for number, count in enumerate(neighbours["shared"])]
    of = f"nearest by the teacher that the student finds, of {neighbours['nearest']}"
    return Chart("How many neighbours are shared", Axis(of), Axis("sentences", zero=True), bars=bars)


def _date(sessions: list[dict[str, Any]]) -> str:
    """The day on which a stage was last worked at, in UTC; '' if that was not recorded."""
    return time.strftime("%Y-%m-%d", time.gmtime(sessions[-1]["started"])) if sessions else ""


def _shortened(sentence: str) -> str:
    return sentence if len(sentence) <= MOST_CHARACTERS else sentence[: MOST_CHARACTERS - 1] + "…"
