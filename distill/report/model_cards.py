"""The model cards of exported students with their results: the model, its nested sizes and the teacher side by side."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from distill.config import RunConfig
from distill.export.card import model_card
from distill.export.export_stage import ExportStage
from distill.metrics.results import TEACHER, ModelResults
from distill.report.result_tables import COSTS, FIDELITY, MINUS, Cell, Metric, Results, columns_of, full_size, metrics_of_sets
from distill.run.files import publish
from distill.run.formatting import format_markdown_table


def write_model_cards(config: RunConfig, results: Results) -> None:
    """Replaces README.md of each exported folder that is there by the card with the section "Results".

    results: of all models of the run.
    """
    export = config.stage_of("export")
    assert isinstance(export, ExportStage)
    for name in config.trained_stages:
        folder = export.directory / name
        if not folder.is_dir():
            continue
        card = model_card(folder, export.provenance(name), model_index(f"{config.name}/{name}", results.get(name)))
        if name in results:
            card += f"\n{results_section(name, results)}\n"
        with publish(folder / "README.md") as file:
            file.write(card.encode())


def model_index(model: str, results: ModelResults | None) -> list[dict[str, Any]]:
    """The results of a model in the hub's format; [] without any."""
    if results is None:
        return []
    scores: list[tuple[str, str, str, Any]] = [
        ("semantic-similarity", name, "spearman_cosine", score / 100)
        for name, score in results.sts.items()
        if isinstance(score, float) and name != "AVG"
    ]
    scores += [("information-retrieval", name, "cosine_ndcg@10", each["ndcg@10"]) for name, each in results.retrieval.items()]
    scores += [("text-classification", name, "accuracy", each["accuracy"]) for name, each in results.transfer.items()]
    found = [
        EvalResult(task, dataset_type=name, dataset_name=name, metric_type=metric, metric_value=round(float(value), 4))
        for task, name, metric, value in scores
    ]
    return eval_results_to_model_index(model, found) if found else []


def results_section(name: str, results: Results) -> str:
    """The section "Results" of the card of the model `name`.

    A value is shown as 72.37 [70.90, 73.80] where the results have its 95% interval, and as "-" where a model has none.
    """
    nested = [other for other in results if other != name and full_size(other, results) == name]
    models = {each: results[each] for each in [name, *nested, TEACHER] if each in results}
    columns = columns_of([*COSTS, *FIDELITY.values(), *metrics_of_sets(models)], models)
    rows = [[_row_name(metric), *map(_cell, cells)] for metric, cells in columns.items()]
    lines = ["## Results", "", format_markdown_table(["", *models], rows)]
    if notes := _notes(models.values()):
        lines += ["", " ".join(notes)]
    return "\n".join(lines)


def _row_name(metric: Metric) -> str:
    task, *keys = metric.keys
    if task == "fidelity":
        return f"fidelity: {metric.name}"
    if task == "sts":
        return "STS: average" if keys == ["AVG"] else f"STS: {metric.name}"
    return f"{task}: {', '.join(keys)}" if keys else metric.name


def _cell(cell: Cell) -> str:
    interval = f" [{', '.join(cell.interval)}]" if cell.interval else ""
    return (cell.text + interval).replace(MINUS, "-")


def _overlap(models: Collection[ModelResults]) -> str:
    """STS12: 3 of 2,812 texts, scifact: none of 300 queries, ..."""
    parts = next((results.overlap for results in models if results.overlap), {})
    return ", ".join(
        f"{name}: {f'{each.found:,}' if each.found else 'none'} of {each.texts:,} {kind}"
        for name, kinds in parts.items()
        for kind, each in kinds.items()
    )


def _notes(models: Collection[ModelResults]) -> list[str]:
    notes = []
    if texts := [results.fidelity.texts for results in models if results.fidelity]:
        notes.append(f"Fidelity is agreement with the teacher's cosines on {max(texts):,} held-out texts.")
    if averaged := next((results.at("sts", "AVG_OF") for results in models if results.sts), None):
        notes.append(f"STS is Spearman x 100; the average is of {', '.join(averaged)}.")
    if overlap := _overlap(models):
        notes.append(f"Texts of these sets that are in the training text: {overlap}.")
    if any(results.sts_ci or results.retrieval_ci or results.transfer_ci for results in models):
        notes.append("In brackets: 95% bootstrap intervals.")
    return notes
