"""The export stage: every trained student of a run as a folder under runs/NAME/export."""

from __future__ import annotations

from distill.config import RunConfig
from distill.export.card import model_card
from distill.export.sentence_transformers import export_student
from distill.files import sha256_of
from distill.shards import ShardReader, fingerprint
from distill.stages import read_json, stage_of, trained_stages

NUM_CHECKED = 200


def export_run(config: RunConfig) -> dict[str, str]:
    """Exports the students of all finished training stages; returns stage -> folder. Raises ValueError if one is missing."""
    stage = stage_of(config, "export")
    for name, found in stage.inputs.items():
        if not found:
            raise ValueError(f"export needs {config.run_dir / name}, which is not finished: run that stage first")
    text = read_json(config.run_dir / "precompute" / "text" / "manifest.json")
    reader = ShardReader(config.run_dir / "shards")
    check_on = reader.texts(list(range(min(NUM_CHECKED, len(reader)))))
    stage.begin()
    folders: dict[str, str] = {}
    for name in trained_stages(config):
        out = stage.directory / name
        export_student(config.run_dir / name / "student", out, card=model_card(config, name, text, None), check_on=check_on)
        folders[name] = str(out)
    weights = {str(path.relative_to(stage.directory)): sha256_of(path) for path in stage.directory.rglob("*.safetensors")}
    stage.finish({"folders": folders}, fingerprint(weights))
    return folders
