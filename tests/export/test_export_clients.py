"""Real clients, each installed into a folder of its own, give the vectors of the students that were exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import FAMILIES, ROTARY, save_family
from students import TEXTS, export, make_student

from distill.export.sentence_transformers import TOKEN_POOLING
from distill.student.pooling import NEEDS_HIDDEN_STATES

pytestmark = pytest.mark.soak
TORCH = Path(torch.__file__).parent

SENTENCE_TRANSFORMERS = """
import json, sys
import numpy as np
from pathlib import Path
from sentence_transformers import SentenceTransformer

options = {"backend": "onnx", "model_kwargs": {"file_name": "onnx/model.onnx"}} if sys.argv[1] == "onnx" else {}
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu", **options)
    np.save(Path(folder, "found.npy"), model.encode(json.loads(Path(folder, "texts.json").read_text())))
"""

FASTEMBED = """
import json, sys
import numpy as np
from pathlib import Path
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

file = sys.argv[1]
for folder in sys.argv[2:]:
    dim = json.loads(Path(folder, "export.json").read_text())["dim"]
    TextEmbedding.add_custom_model(
        folder, pooling=PoolingType.DISABLED, normalization=False, sources=ModelSource(hf="no/hub"), dim=dim, model_file=file
    )
    model = TextEmbedding(folder, specific_model_path=folder)
    np.save(Path(folder, "found.npy"), list(model.embed(json.loads(Path(folder, "texts.json").read_text()))))
"""

TRANSFORMERS_JS = """
import { AutoModel, AutoTokenizer, env, pipeline } from '@huggingface/transformers';
import fs from 'fs';
const [dtype, ...folders] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = '/';
for (const folder of folders) {
  const texts = JSON.parse(fs.readFileSync(`${folder}/texts.json`));
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModel.from_pretrained(folder, { dtype });
  const { sentence_embedding } = await model(tokenizer(texts, { padding: true, truncation: true }));
  fs.writeFileSync(`${folder}/found.json`, JSON.stringify(sentence_embedding.tolist()));
  const extract = await pipeline('feature-extraction', folder, { dtype });
  const pooled = await extract(texts, { pooling: 'mean', normalize: true });
  fs.writeFileSync(`${folder}/pipeline.json`, JSON.stringify(pooled.tolist()));
}
"""


def add(student_dir, out, encoder, **options):
    student = make_student(student_dir, encoder, **options)
    export(student_dir, out, "onnx", "onnx-int8")
    (out / "texts.json").write_text(json.dumps(TEXTS))
    np.save(out / "expected.npy", student.encode(TEXTS))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_encoder):
    """The exports of a headless student, of students with a head for each pooling, and of one for each other architecture."""
    pytest.importorskip("onnxscript")
    work = tmp_path_factory.mktemp("clients")
    add(work / "student/ckd", work / "ckd", tiny_encoder)
    for pooling in TOKEN_POOLING:
        add(work / "student" / pooling, work / pooling, tiny_encoder, pooling=pooling, head="tanh")
    for family in (*FAMILIES[1:], *ROTARY):
        encoder = save_family(family, tiny_encoder, work / "encoder" / family)
        add(work / "student" / family, work / family, encoder, pooling="mean", head="linear")
    return work


def folders_of(exported, *without):
    return [exported / name for name in ("ckd", *TOKEN_POOLING, *FAMILIES[1:], *ROTARY) if name not in without]


def install(command):
    """Runs an installation, or skips the test if it fails, as it does where the registry is not reachable."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def python_with(folder, *packages):
    """A virtual environment with these packages and this environment's torch, which is large, and nothing else of it."""
    install([sys.executable, "-m", "venv", folder])
    links = folder / "torch"
    links.mkdir()
    for path in (TORCH, TORCH.with_name("torchgen"), TORCH.with_name("functorch"), *TORCH.parent.glob("torch-*.dist-info")):
        (links / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{links}\n")
    install([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages])
    return folder / "bin/python"


@pytest.fixture(scope="module")
def python_5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment") / "5"
    onnx = ("optimum-onnx[onnxruntime]==0.1.0", "fastembed==0.7.4")
    return python_with(folder, "sentence-transformers==5.1.0", "transformers==4.57.1", *onnx)


def run(interpreter, code, *arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    script = cwd / f"client{'.mjs' if 'import {' in code else '.py'}"
    script.write_text(code)
    command = [interpreter, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def check(folders, lowest=0.99999, read=lambda folder: np.load(folder / "found.npy"), num_texts=None):
    for folder in folders:
        differences_nd = (read(folder) - np.load(folder / "expected.npy"))[:num_texts]
        worst = 1 - np.square(differences_nd).sum(axis=1).max() / 2
        assert worst >= lowest, (folder.name, worst)


@pytest.mark.parametrize("packages", [["sentence-transformers==3.4.1", "transformers==4.48.3"], []], ids=["3.4", "installed"])
def test_sentence_transformers_gives_the_students_vectors(exported, tmp_path, packages):
    python = python_with(tmp_path / "environment", *packages) if packages else sys.executable
    run(python, SENTENCE_TRANSFORMERS, "torch", *folders_of(exported), cwd=tmp_path)
    check(folders_of(exported))


def test_sentence_transformers_5_gives_the_students_vectors(exported, tmp_path, python_5):
    run(python_5, SENTENCE_TRANSFORMERS, "torch", *folders_of(exported), cwd=tmp_path)
    check(folders_of(exported))


def test_the_onnx_backend_of_sentence_transformers_gives_the_vectors_of_all_but_poolings_of_several_layers(
    exported, tmp_path, python_5
):
    folders = folders_of(exported, *NEEDS_HIDDEN_STATES)
    run(python_5, SENTENCE_TRANSFORMERS, "onnx", *folders, cwd=tmp_path)
    check(folders)


@pytest.mark.parametrize("file, lowest", [("onnx/model.onnx", 0.99999), ("onnx/model_quantized.onnx", 0.99)])
def test_fastembed_gives_the_students_vectors(exported, tmp_path, python_5, file, lowest):
    run(python_5, FASTEMBED, file, *folders_of(exported), cwd=tmp_path)
    check(folders_of(exported), lowest)


@pytest.mark.parametrize("dtype, lowest", [("fp32", 0.99999), ("q8", 0.99)])
def test_transformers_js_gives_the_students_vectors_as_sentence_embedding(exported, tmp_path, dtype, lowest):
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    install(["npm", "install", "--ignore-scripts", "--prefix", tmp_path, "@huggingface/transformers@4"])
    folders = folders_of(exported, "t5", "qwen2")  # of T5 it looks for onnx/encoder_model.onnx; here, Qwen2 truncates all texts
    run("node", TRANSFORMERS_JS, dtype, *folders, cwd=tmp_path)
    whole = {"num_texts": len(TEXTS) - 1}  # transformers.js truncates after it added [SEP], which the longer text loses
    check(folders, lowest, lambda folder: np.array(json.loads((folder / "found.json").read_text())), **whole)
    check([exported / "ckd"], lowest, lambda folder: np.array(json.loads((folder / "pipeline.json").read_text())), **whole)
    pooled = json.loads((exported / "mean/pipeline.json").read_text())
    assert len(pooled[0]) == 32, "the pipeline pools the tokens and leaves out the head"
