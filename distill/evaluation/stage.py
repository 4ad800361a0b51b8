"""The evaluate stage: teacher and exported students side by side, from the folders that others will load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from distill.config import RunConfig
from distill.evaluation.encode import Encoder, encoder_of, throughput
from distill.evaluation.fidelity import fidelity
from distill.evaluation.index import forms_of
from distill.evaluation.neighbours import neighbours
from distill.evaluation.report import tables
from distill.evaluation.tasks import Encoded, Tasks, read_tasks
from distill.export.card import model_card
from distill.files import publish, write_json
from distill.report import write_report
from distill.search import build_index
from distill.sessions import session
from distill.shards import ShardReader, fingerprint
from distill.stages import read_json, stage_of, trained_stages
from distill.teacher.encoder import Teacher
from distill.training.dev import split_held_out

THROUGHPUT_SENTENCES = 512


def evaluate_run(config: RunConfig) -> str:
    """Measures everything, writes evaluate/results.json and the search index, completes the model cards; returns the table."""
    stage = stage_of(config, "evaluate")
    if not stage.inputs["export"]:
        raise ValueError(f"evaluate needs {config.run_dir / 'export'}, which is not finished: run the export stage first")
    section = config.evaluate
    forms = forms_of([], section.precision or [], section.rescore)
    tasks = read_tasks(section.sts, section.retrieval or [], section.transfer or [], forms)
    stage.begin()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with session(stage.directory, "evaluate", device):
        results, encoder = _evaluate(config, stage.directory, tasks, device)
    text = read_json(config.precompute_dir / "text" / "manifest.json")
    for name in trained_stages(config):
        with publish(config.run_dir / "export" / name / "README.md") as file:
            file.write(model_card(config, name, text, results[name], beside=results).encode())
    printed = tables([{"model": name, **row} for name, row in results.items()])
    with publish(stage.directory / "table.txt") as file:
        file.write(printed.encode() + b"\n")
    stage.finish({"models": list(results), "index": encoder}, fingerprint(results))
    write_report(config)
    return printed


def _evaluate(config: RunConfig, directory: Path, tasks: Tasks, device: torch.device) -> tuple[dict[str, dict[str, Any]], str]:
    """Writes results.json, neighbours.json and the search index; returns the results, and which model the index is of."""
    held_out = _held_out(config)
    reader = ShardReader(config.shards_dir)
    speed_sentences = reader.texts(np.arange(min(THROUGHPUT_SENTENCES, len(reader))))
    results: dict[str, dict[str, Any]] = {}
    models: list[tuple[str, Encoder | Teacher]] = []
    if config.teacher.model is not None and config.teacher.placement != "zero3":  # that one fits no single process
        offload = config.precompute_dir / "offload"
        models.append(("teacher", Teacher(config.teacher, device, None, offload=offload)))
    for name in trained_stages(config):
        models.append((name, encoder_of(config.run_dir / "export" / name, batch_size=config.evaluate.batch_size)))
    if not models:
        raise ValueError(
            "evaluate has nothing to measure: the teacher is no model that runs here, and no stage trains a student"
        )
    for name, encoder in tqdm(models, desc="evaluate", unit="model", disable=None):
        results |= _measure(config, name, encoder, held_out, tasks, speed_sentences)
    name, encoder = models[-1]
    if trained_stages(config):
        build_index(config, reader, encoder, directory)
        if held_out is not None:
            sentences, vectors = held_out
            write_json(directory / "neighbours.json", {"model": name, **neighbours(sentences, encoder(sentences), vectors)})
    write_json(directory / "results.json", results)
    return results, name


def _held_out(config: RunConfig) -> tuple[list[str], np.ndarray] | None:
    path = config.shards_dir / "held_out"
    if not (path / "manifest.json").exists():
        return None
    reader = ShardReader(path)
    rows, _ = split_held_out(len(reader), config.evaluate.num_held_out, config.evaluate.dev_sentences)
    return (reader.texts(rows), reader.vectors(rows).astype(np.float32)) if len(rows) >= 3 else None


def _measure(
    config: RunConfig,
    name: str,
    encoder: Encoder | Teacher,
    held_out: tuple[list[str], np.ndarray] | None,
    tasks: Tasks,
    speed_sentences: list[str],
) -> dict[str, dict[str, Any]]:
    """The rows of one model: itself and, for HPD, its nested sizes, which are prefixes of the same vectors."""
    speed = throughput(encoder, speed_sentences)
    sizes = [encoder.dim] + ([*config.hpd.nested] if name == "hpd" else [])
    vectors = encoder(held_out[0]) if held_out is not None else None
    sentences = tasks.sentences
    encoded = Encoded(sentences, encoder(sentences)) if sentences else None
    rows: dict[str, dict[str, Any]] = {}
    for size in sizes:
        row: dict[str, Any] = {
            "dim": size,
            "params": encoder.params,
            "bytes_per_vector": 4 * size,
            "sentences_per_second": round(speed, 1),
        }
        if held_out is not None and vectors is not None:
            row["fidelity"] = fidelity(vectors[:, :size], held_out[1]) | {"sentences": len(vectors)}
        if encoded is not None:
            row |= tasks.measure(encoded.truncated(size))
        rows[name if size == encoder.dim else f"{name}-{size}"] = row
    return rows
