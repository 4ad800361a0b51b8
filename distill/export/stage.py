"""The export stage: every trained student of a run as a folder under runs/NAME/export."""

from __future__ import annotations

from functools import partial

import torch

from distill.config import RunConfig
from distill.export.card import model_card
from distill.export.folder import export_student
from distill.export.formats import require_packages
from distill.export.sentence_transformers import check_pooling
from distill.files import sha256_of
from distill.sessions import session
from distill.shards import ShardReader, fingerprint
from distill.stages import read_json, stage_of, trained_stages

NUM_CHECKED = 1000


def export_run(config: RunConfig) -> dict[str, str]:
    """Exports the students of all finished training stages; returns stage -> folder.

    Raises ValueError before any work if a stage is missing, if a package that export.formats needs is, or if the pooling
    cannot be exported; and if a written format does not agree with its student.
    """
    stage = stage_of(config, "export")
    require_packages(config.export.formats)
    for name, found in stage.inputs.items():
        if not found:
            raise ValueError(f"export needs {config.run_dir / name}, which is not finished: run that stage first")
    check_pooling(config.student.pooling)
    text = read_json(config.precompute_dir / "text" / "manifest.json")
    reader = ShardReader(config.shards_dir)
    check_on = reader.texts(list(range(min(NUM_CHECKED, len(reader)))))
    stage.begin()
    folders: dict[str, str] = {}
    cosines: dict[str, dict[str, dict[str, float]]] = {}
    with session(stage.directory, "export", torch.device("cpu")):
        for name in trained_stages(config):
            out = stage.directory / name
            card = partial(model_card, config, name, text, None)
            agreements = export_student(
                config.run_dir / name / "student", out, card=card, check_on=check_on, formats=config.export.formats
            )
            folders[name] = str(out)
            cosines[name] = {each: {"worst": found.worst, "mean": found.mean} for each, found in agreements.items()}
    files = sorted(path for path in stage.directory.rglob("*") if path.suffix in (".safetensors", ".onnx"))
    weights = {str(path.relative_to(stage.directory)): sha256_of(path) for path in files}
    stage.finish({"folders": folders, "cosines": cosines}, fingerprint(weights))
    return folders
