"""The rows of a study: every model of its runs, with what it is compared to, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.config import RunConfig
from distill.evaluation.evaluate_stage import UNTRAINED
from distill.evaluation.score_tables import Row, Table, cell, table_of
from distill.metrics.quantise import Precision
from distill.metrics.results import TEACHER, ModelResults, read_results
from distill.report.result_tables import FIDELITY_NAMES, sts_difference
from distill.run.files import fingerprint, read_json
from distill.run.session_log import read_sessions

PRECISIONS: tuple[Precision, ...] = ("int8", "binary")


class StudyRow(NamedTuple):
    """initial: the name of the row that the model began with or whose vectors it reduces. minutes: of its training."""

    name: str
    results: ModelResults
    initial: str | None = None
    minutes: float | None = None


def read_rows(configs: Sequence[RunConfig]) -> list[StudyRow]:
    """The rows of finished runs: the teacher, then the students; each before training, trained, and at smaller sizes."""
    found = {config.name: read_results(config.run_dir / "evaluate" / "results.json") for config in configs}
    teachers = {name: results for run in found.values() for name, results in run.items()}  # the same in every run
    rows = [StudyRow(name, teachers[name], None if name == TEACHER else TEACHER) for name in _sizes(TEACHER, teachers)]
    untrained: dict[str, str] = {}
    for config in configs:
        results = found[config.name]
        student = config.student.model_dump(mode="json", exclude={"freeze_embeddings"})
        identity = fingerprint({"student": student, "seed": config.seed})
        if identity not in untrained and UNTRAINED in results:
            name = _untrained_name(config)
            untrained[identity] = f"{name}-{config.name}" if name in untrained.values() else name
            rows.append(StudyRow(untrained[identity], results[UNTRAINED]))
        for stage in config.trained_stages:
            init = getattr(config.train(stage), "init", "student")
            initial = untrained.get(identity) if init == "student" else name_in_study(config, init)
            minutes = _minutes(config.run_dir / stage)
            for name in _sizes(stage, results):
                reduced = name_in_study(config, stage) if name.startswith(f"{stage}-pca-") else initial
                rows.append(StudyRow(name_in_study(config, name), results[name], reduced, minutes))
    return rows


def study_table(rows: Sequence[StudyRow]) -> Table:
    """A row for each model; differences in the STS average have paired 95% intervals."""
    by_name = {row.name: row.results for row in rows}
    return table_of([_cells(row, by_name) for row in rows])


def name_in_study(config: RunConfig, name: str) -> str:
    """The row of a model of a run: that of CKD is called as its config, others are NAME-STAGE."""
    return config.name + f"-{name}".removeprefix("-ckd")


def _cells(row: StudyRow, by_name: dict[str, ModelResults]) -> Row:
    results = row.results
    fidelity = [f"{results.at('fidelity', key):.3f}" for key in FIDELITY_NAMES] if results.fidelity else []
    return {
        "model": row.name,
        "params": f"{results.params / 1e6:.0f}M",
        "dim": cell(results.dim),
        "bytes": cell(results.bytes_per_vector, "{:,}"),
        "texts/s": cell(results.texts_per_second, "{:,.0f}"),
        "minutes": cell(row.minutes, "{:.1f}"),
        "STS": cell(results.at("sts", "AVG"), "{:.2f}"),
        "to the teacher (95%)": _difference(results, by_name[TEACHER]) if row.name != TEACHER else None,
        "to its initial model (95%)": _difference(results, by_name[row.initial]) if row.initial else None,
        **{precision: cell(results.at("sts_quantised", precision, "AVG"), "{:.2f}") for precision in PRECISIONS},
        "fidelity": " / ".join(fidelity) or None,
    }


def _difference(results: ModelResults, other: ModelResults) -> str | None:
    found = sts_difference(other, results)
    return f"{found[0]:+.2f} ({cell(found[1:], '{:+.2f}')})" if found else None


def _sizes(model: str, results: Mapping[str, ModelResults]) -> list[str]:
    """A model and its smaller sizes, from large to small."""
    names = [name for name in results if name == model or name.startswith(f"{model}-")]
    return sorted(names, key=lambda name: -results[name].dim)


def _untrained_name(config: RunConfig) -> str:
    """untrained-minilm-l6, untrained-mpnet-base-0-5-11, untrained-mpnet-base-6 for six layers, evenly spread."""
    student = config.student
    layers = [student.layers] if isinstance(student.layers, int) else student.layers or []
    encoder = Path(student.init if student.init != "teacher" else str(config.teacher.model)).name
    return "-".join([UNTRAINED, encoder, *map(str, layers)])


def _minutes(stage: Path) -> float | None:
    """Of training, with the encoding by a frozen encoder before it."""
    done = read_json(stage / "DONE.json")
    encoding = sum(session["seconds"] for session in read_sessions(stage) if session["work"] == "encode")
    return (done["results"]["seconds"] + encoding) / 60 if done else None
