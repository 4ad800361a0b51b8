"""The page: report.html, filled from the files of a run."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from distill.config import RunConfig
from distill.export.card import public
from distill.metrics.results import TEACHER, read_results
from distill.report import run_tables
from distill.report.charts import Chart
from distill.report.model_cards import write_model_cards
from distill.report.result_charts import result_charts
from distill.report.result_tables import Results, full_size, headline, result_tables
from distill.report.training_charts import MAX_POINTS, read_curves, training_charts
from distill.run.config import dump_config
from distill.run.files import publish, read_json
from distill.run.formatting import format_bytes
from distill.training.tasks import training_tasks

HERE = Path(__file__).parent
MAX_CHARACTERS = 400  # of a text that is shown


def write_report(config: RunConfig) -> Path:
    """Writes the model cards and <run>/report.html from the run's files; returns the path of the page.

    Raises ValueError if the run is not evaluated yet.
    """
    results_path = config.run_dir / "evaluate" / "results.json"
    if not results_path.is_file():
        raise ValueError(f"{config.run_dir} has no evaluate/results.json to report: run its evaluate stage first")
    results = _in_order(read_results(results_path), config)
    write_model_cards(config, results)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shortened": _shortened, "number": "{:,}".format, "bytes": format_bytes, "quoted": shlex.quote}
    environment.filters["breakable"] = breakable
    path = config.run_dir / "report.html"
    with publish(path) as file:
        file.write(environment.get_template("page.html").render(_context(config, results)).encode())
    return path


def _context(config: RunConfig, results: Results) -> dict[str, Any]:
    """The variables of the template."""
    text = read_json(config.precompute_dir / "text" / "manifest.json")
    students = [name for name in config.trained_stages if name in results]
    neighbours = read_json(config.run_dir / "evaluate" / "neighbours.json")
    sessions = run_tables.sessions_of(config).get("evaluate")
    recipe = short_config(config)
    sts_warnings = [(model.sts, warning) for model in results.values() for warning in model.sts_warnings]
    return {
        "name": config.name,
        "style": Markup((HERE / "style.css").read_text(encoding="utf-8")),  # safe: a file of this package
        "teachers": [public(name) for name in config.teacher.names],
        "method": training_tasks()[students[-1]].title if students else None,
        "measured_on": time.strftime("%Y-%m-%d", time.gmtime(sessions[-1]["started"])) if sessions else None,
        "tiles": headline(results, students[-1]) if students else [],
        "results": result_tables(results),
        "averaged": next((model.sts["AVG_OF"] for model in results.values() if model.sts), []),
        "num_held_out": max((model.fidelity.texts for model in results.values() if model.fidelity), default=0),
        "warnings": dict.fromkeys(warning for sets, warning in sts_warnings if warning.split()[0] in sets),
        "quality_charts": result_charts(results),
        "stages": _stages(config),
        "max_points": MAX_POINTS,
        "neighbours": neighbours,
        "shared_chart": _shared_chart(neighbours) if neighbours else None,
        "text": text,
        "sources": run_tables.source_table(text) if text else None,
        "status": run_tables.status_table(text) if text else None,
        "lengths_chart": run_tables.lengths_chart(text) if text else None,
        "precompute": run_tables.stage_results(config, "precompute"),
        "costs": run_tables.cost_table(config),
        "tasks": run_tables.task_table(config),
        "versions": run_tables.version_table(config),
        "recipe": recipe,
        "recipe_link": "data:text/yaml;charset=utf-8," + quote(recipe),
        "config": dump_config(config),
        "changed_stages": changed_stages(config),
        "run_dir": str(config.run_dir),
    }


def _in_order(results: Results, config: RunConfig) -> Results:
    """The teacher, the training stages in their order, each with its nested sizes from large to small, then the others."""
    order = {name: number for number, name in enumerate([TEACHER, *config.trained_stages])}
    names = sorted(results, key=lambda name: (order.get(full_size(name, results), len(order)), -results[name].dim))
    return {name: results[name] for name in names}


def _stages(config: RunConfig) -> list[dict[str, Any]]:
    """Name, method, results and charts of each training stage that has results or curves."""
    found = []
    for name in config.trained_stages:
        results = run_tables.stage_results(config, name)
        charts = training_charts(name, read_curves(config.run_dir / "tensorboard" / name), results.get("best_step"))
        if results or charts:
            found.append({"name": name, "method": training_tasks()[name].title, "results": results, "charts": charts})
    return found


def short_config(config: RunConfig) -> str:
    """The YAML of what differs from the defaults: `load_config` of it gives an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def changed_stages(config: RunConfig) -> list[str]:
    """Stages that were made from another config than the one in the run directory, and how it differs."""
    found = []
    for name in config.stages:
        stage = config.stage_of(name)
        done = read_json(stage.directory / "DONE.json")
        if done is not None and (changes := stage.changes_since(done)):
            found.append(f"{name}: {'; '.join(changes)}")
    return found


def _shared_chart(neighbours: dict[str, Any]) -> Chart:
    bars = [(number - 0.5, number + 0.5, count) for number, count in enumerate(neighbours["shared"])]
    xlabel = f"nearest by the teacher that the student finds, of {neighbours['nearest']}"
    return Chart("How many neighbours are shared", xlabel, "texts", bars=bars)


def breakable(name: str) -> Markup:
    """A name that a narrow column breaks after a slash or underscore, never inside a word."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name))))  # safe: escaped, and no entity has these characters


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
