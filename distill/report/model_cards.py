"""The model cards of exported students with their results: the model, its nested sizes and the teacher side by side."""

from __future__ import annotations

from collections.abc import Mapping

from distill.config import RunConfig
from distill.export.card import model_card
from distill.export.export_stage import ExportStage
from distill.metrics.results import TEACHER, Interval, ModelResults
from distill.run.files import publish
from distill.run.formatting import format_markdown_table

FIDELITY = {"spearman": "Spearman, all pairs", "spearman_top50": "Spearman, 50 nearest", "top10": "10 nearest shared"}
MEASURES = {"retrieval": "ndcg@10", "transfer": "accuracy"}


def write_model_cards(config: RunConfig, results: Mapping[str, ModelResults]) -> None:
    """Replaces README.md of each exported folder that is there by the card with the section "Results".

    results: of all models of the run.
    """
    export = config.stage_of("export")
    assert isinstance(export, ExportStage)
    for name in config.training_stages:
        folder = export.directory / name
        if not folder.is_dir():
            continue
        card = model_card(folder, export.provenance(name))
        if name in results:
            card += f"\n{results_section(name, results)}\n"
        with publish(folder / "README.md") as file:
            file.write(card.encode())


def results_section(name: str, results: Mapping[str, ModelResults]) -> str:
    """The section "Results" of the card of the model `name`.

    A value is shown as 72.37 [70.90, 73.80] where the results have its 95% interval, and as "-" where a model has none.
    """
    nested = [other for other in results if other.rpartition("-")[0] == name]
    columns = {each: results[each] for each in [name, *nested, *([TEACHER] if TEACHER in results else [])]}
    cells = {each: _cells(column) for each, column in columns.items()}
    rows = [
        [row, *(column.get(row) for column in cells.values())]
        for row in dict.fromkeys(row for c in cells.values() for row in c)
    ]
    lines = ["## Results", "", format_markdown_table(["", *columns], rows)]
    return "\n".join([*lines, *_notes(list(columns.values()))])


def _cells(results: ModelResults) -> dict[str, str]:
    """The cells of a model's column by the name of their row."""
    cells = {
        "parameters": f"{results.params:,}",
        "dimensions": f"{results.dim:,}",
        "bytes per vector": f"{results.bytes_per_vector:,}",
    }
    if results.fidelity:
        cells |= {f"fidelity: {label}": f"{results.at('fidelity', key):.3f}" for key, label in FIDELITY.items()}
    for name, score in results.sts.items():
        if isinstance(score, float):
            cells[f"STS: {'average' if name == 'AVG' else name}"] = _cell(score, results.sts_ci.get(name), "{:.2f}")
    for task, measure in MEASURES.items():
        for name, scores in results.at(task).items():
            cells[f"{task}: {name}, {measure}"] = _cell(scores[measure], results.at(f"{task}_ci", name, measure), "{:.3f}")
    return cells


def _cell(value: float, interval: Interval | None, form: str) -> str:
    return form.format(value) + (f" [{form.format(interval[0])}, {form.format(interval[1])}]" if interval else "")


def _notes(columns: list[ModelResults]) -> list[str]:
    notes = []
    if texts := [results.fidelity.texts for results in columns if results.fidelity]:
        notes.append(f"Fidelity is agreement with the teacher's cosines on {max(texts):,} held-out texts.")
    if averaged := next((results.at("sts", "AVG_OF") for results in columns if results.sts), None):
        notes.append(f"STS is Spearman x 100; the average is of {', '.join(averaged)}.")
    if any(results.sts_ci or results.retrieval_ci or results.transfer_ci for results in columns):
        notes.append("In brackets: 95% bootstrap intervals.")
    return ["", " ".join(notes)] if notes else []
