"""The contrast with the teacher leaves a copy of the teacher as it is, however close together the teacher's vectors lie."""

from __future__ import annotations

import gzip
import itertools
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, launch
from curves import events_of, points_of
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from distill.config import load_config
from distill.objectives.scale import LOWEST_SCALE, fitting_scale
from distill.shards import ShardReader

TEXTS = 7000
PROMPTS = {"query": "a question: ", "document": "a text that answers it: "}


@pytest.mark.parametrize("given, is_fitted", [("null", True), ("30", False)])
def test_the_scale_follows_from_the_teachers_vectors_unless_it_is_given(embedded_copy, given, is_fitted):
    config, _ = embedded_copy
    reader = ShardReader(load_config(config).shards_dir)
    scale = fitting_scale(torch.from_numpy(reader.vectors(np.arange(len(reader)))), 32 + 128, 100.0)
    assert scale > LOWEST_SCALE  # the vectors of an untrained encoder lie close together
    done = call("train.py", "--config", config, "stage=ckd", "ckd.max_steps=1", f"ckd.temperature.scale={given}")
    assert done.returncode == 0, done.stdout
    assert (f"ckd: the contrast's scale is {scale:g}, not 20" in done.stdout) == is_fitted


def copy_of(model: Path, folder: Path, kind: str) -> Path:
    """minilm-l6 with [CLS] instead of the mean, with a Dense of the same width, or with prompts."""
    transformer = Transformer(str(model))
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, pooling_mode="cls" if kind == "cls" else "mean")]
    if kind == "dense":
        torch.manual_seed(0)
        modules.append(Dense(width, width))
    SentenceTransformer(modules=[*modules, Normalize()], prompts=PROMPTS if kind == "prompts" else None).save(str(folder))
    return folder


@cache
def fidelity_after_20_steps(model: Path, folder: Path, role: str) -> float:
    """Spearman on held-out text of an untrained full copy of `model`, trained towards it at the default rate."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    with gzip.open(Path(os.environ["DISTILL_DATA"]) / "unlabelled/wiki1m_en.txt.gz", "rt", encoding="utf-8") as lines:
        text.write_text("".join(itertools.islice(lines, TEXTS)), encoding="utf-8")
    config = folder / "run.yaml"
    config.write_text(
        f"""
name: copy
runs_dir: {folder / "runs"}
text: {{sources: [{{type: file, path: {text}{role and f", role: {role}"}}}]}}
teacher: {{model: {model}, max_length: 64}}
student: {{init: teacher, max_length: 64}}
ckd: {{max_steps: 20, dev_every: 20}}
engine: {{num_ranks: 1}}
stages: [precompute, ckd]
"""
    )
    done = launch("pipeline.py", "--config", config)
    assert done.returncode == 0, done.stdout
    curve = dict(points_of(events_of(folder / "runs/copy", "ckd"))["dev/fidelity/spearman"])
    assert curve[0] > 0.9995
    return curve[20]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["cls", "dense", "prompts", "me5-small"])
def test_a_copy_of_any_model_keeps_its_fidelity_as_that_of_a_mean_pooled_one_does(kind, tmp_path_factory):
    models = Path(os.environ.get("DISTILL_MODELS", "."))
    name = "me5-small" if kind == "me5-small" else "minilm-l6"
    if "DISTILL_DATA" not in os.environ or not (models / name).is_dir():
        pytest.skip(f"DISTILL_DATA and DISTILL_MODELS with {name} are not set")
    folder = tmp_path_factory.getbasetemp() / f"unmodified-{name}"
    unmodified = fidelity_after_20_steps(models / name, folder, "")
    made = tmp_path_factory.mktemp(kind)
    model = models / name if name == kind else copy_of(models / name, made / "model", kind)
    changed = fidelity_after_20_steps(model, made, "" if kind in ("cls", "dense") else "document")
    print(f"{kind}: {changed:.4f}, unmodified {unmodified:.4f}")
    assert changed > unmodified - 0.01
