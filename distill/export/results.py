"""The results of a model card as a table: this model, its nested sizes and its teacher side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIDELITY = {"spearman": "Spearman, all pairs", "spearman_top50": "Spearman, 50 nearest", "top10": "10 nearest shared"}
MEASURES = {"retrieval": "ndcg@10", "transfer": "accuracy"}
Results = Mapping[str, Any]


def results_table(stage: str, results: Results, beside: Mapping[str, Results]) -> str:
    """The section "Results" of a card: a column for the model, for "STAGE-SIZE" and for "teacher" where `beside` has them.

    A figure stands as 72.37 [70.9, 73.8] where the results carry its 95% interval. What a model has not is "-".
    """
    others = [name for name in beside if name.startswith(f"{stage}-")]
    columns = {stage: results} | {name: beside[name] for name in [*others, *(["teacher"] if "teacher" in beside else [])]}
    cells = {name: _cells(column) for name, column in columns.items()}
    rows = list(dict.fromkeys(row for column in cells.values() for row in column))
    lines = ["## Results", "", f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| {row} | {' | '.join(column.get(row, '-') for column in cells.values())} |" for row in rows]
    return "\n".join([*lines, *_notes(columns)])


def _cells(results: Results) -> dict[str, str]:
    """What stands in a model's column, row by row."""
    cells = {
        "parameters": f"{results['params']:,}",
        "dimensions": f"{results['dim']:,}",
        "bytes a vector": f"{results['bytes_per_vector']:,}",
    }
    fidelity = results.get("fidelity", {})
    cells |= {f"fidelity: {words}": f"{fidelity[name]:.3f}" for name, words in FIDELITY.items() if name in fidelity}
    intervals = results.get("sts_ci", {})
    for name, score in results.get("sts", {}).items():
        if isinstance(score, float):
            cells[f"STS: {'average' if name == 'AVG' else name}"] = _figure(score, intervals.get(name), "{:.2f}")
    for task, measure in MEASURES.items():
        for name, scores in results.get(task, {}).items():
            interval = results.get(f"{task}_ci", {}).get(name, {}).get(measure)
            cells[f"{task}: {name}, {measure}"] = _figure(scores[measure], interval, "{:.3f}")
    return cells


def _figure(value: float, interval: list[float] | None, form: str) -> str:
    return form.format(value) + (f" [{form.format(interval[0])}, {form.format(interval[1])}]" if interval else "")


def _notes(columns: Mapping[str, Results]) -> list[str]:
    notes = []
    sentences = {column["fidelity"]["sentences"] for column in columns.values() if "sentences" in column.get("fidelity", {})}
    if sentences:
        notes.append(f"Fidelity is to the teacher's cosines, on {max(sentences):,} held-out sentences.")
    averaged: list[str] = next((column["sts"]["AVG_OF"] for column in columns.values() if column.get("sts")), [])
    if averaged:
        notes.append(f"STS is Spearman x 100; the average is of {', '.join(averaged)}.")
    if any(column.get(f"{task}_ci") for column in columns.values() for task in ("sts", *MEASURES)):
        notes.append("In brackets: 95% bootstrap intervals.")
    return ["", " ".join(notes)] if notes else []
