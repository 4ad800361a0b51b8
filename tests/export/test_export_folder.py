"""An exported folder is whole, agrees with its student in every format and needs nothing of this project, or is not there."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, environment
from reference_times import hang_limit
from safetensors.torch import load_file, save_file
from students import TEXTS, cosines, export, make_student

from distill.export import folder, formats, int8
from distill.export.card import Provenance, model_card
from distill.export.check import check_format
from distill.export.formats import FORMATS

WITHOUT_US = """
import json, sys
sys.path += json.loads(sys.argv[1])
try:
    import distill
except ImportError:
    pass
else:
    raise SystemExit(f"distill is importable from {distill.__path__}")
texts = json.loads(sys.argv[2])
"""


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def names(path):
    return sorted(each.name for each in path.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_encoder):
    """A student in all formats, the folder it was written from, and its export, moved elsewhere."""
    pytest.importorskip("onnxscript")
    work, elsewhere = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("elsewhere") / "model"
    student = make_student(work / "student", tiny_encoder, pooling="last4_mean", head="tanh", dim=16)
    provenance = Provenance("run", "hpd", "HPD", "tiny", ["tiny"], ["text.txt"], {"dim": 16}, [8], None)

    def card(folder):
        return model_card(folder, provenance)

    export(work / "student", work / "out", "onnx", "onnx-int8", card=card)
    shutil.move(work / "out", elsewhere)
    return student, work / "student", elsewhere


def run_alone(code, folder):
    """Runs `code` without site-packages' .pth files, so without an editable install, in the folder itself."""
    paths = [path for path in sys.path if path and Path(path) != ROOT and not (Path(path) / "distill").exists()]
    arguments = [sys.executable, "-I", "-S", "-c", WITHOUT_US + code, json.dumps(paths), json.dumps(TEXTS)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), cwd=folder, timeout=hang_limit())
    assert done.returncode == 0, done.stderr


def snippets(card, heading):
    """The Python blocks under a heading, with the folder they run in as the model's."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section.replace("this/folder", "."), re.DOTALL)


@pytest.mark.slow
def test_the_cards_snippets_give_the_students_vectors_where_distill_cannot_be_imported(exported, tmp_path):
    student, _, there = exported
    copy = shutil.copytree(there, tmp_path / "copy")
    card = (copy / "README.md").read_text()
    whole, small = snippets(card, "With sentence-transformers")
    run_alone(
        f"{whole}\nassert cosines.shape == (2, 2)\n{small}\nimport numpy as np\n"
        "assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)\n"
        "np.save('st.npy', model.encode(texts)); np.save('small.npy', small.encode(texts))",
        copy,
    )
    (graph,) = snippets(card, "With onnxruntime")
    run_alone(
        f"{graph}\nassert cosines.shape == (2, 2)\n"
        "batch = tokenizer.encode_batch(texts)\n"
        "tokens = {'input_ids': np.array([each.ids for each in batch]),\n"
        "          'attention_mask': np.array([each.attention_mask for each in batch])}\n"
        "np.save('onnx.npy', session.run(['sentence_embedding'], tokens)[0])\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)",
        copy,
    )
    expected = student.encode(TEXTS)
    found, prefix, by_onnx = (np.load(copy / f"{name}.npy") for name in ("st", "small", "onnx"))
    assert np.allclose(found, expected, atol=1e-5) and np.allclose(by_onnx, found, atol=1e-5)
    assert prefix.shape[1] == 8 and np.allclose(cosines(prefix, expected[:, :8]), 1, atol=1e-5)


def test_a_folder_holds_what_it_says_and_no_pickle(exported):
    student, _, there = exported
    assert names(there / "onnx") == ["model.onnx", "model_quantized.onnx"]
    assert "export.json" in (there / "README.md").read_text()  # the card is of a folder that has all else
    assert not [path for path in there.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".py"}]
    about = json.loads((there / "export.json").read_text())
    assert (about["dim"], about["max_length"], about["checked_on"]) == (16, 30, len(TEXTS))
    assert about["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert {name: about["cosines"][name]["worst"] >= each.lowest for name, each in FORMATS.items()} == dict.fromkeys(
        FORMATS, True
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_not_the_students_is_found(exported, tmp_path, name):
    student, _, there = exported
    copy = shutil.copytree(there, tmp_path / "copy")
    expected = student.encode(TEXTS)
    assert check_format(copy, name, "it", TEXTS, expected).worst >= FORMATS[name].lowest
    if name == "sentence-transformers":
        weights = load_file(copy / "model.safetensors")
        weights["embeddings.LayerNorm.bias"][0] += 3
        save_file(weights, copy / "model.safetensors")
    else:
        onnx = importlib.import_module("onnx")
        model = onnx.load(str(copy / FORMATS[name].file))
        bias = next(each for each in model.graph.initializer if each.name.endswith("embeddings.LayerNorm.bias"))
        changed = onnx.numpy_helper.to_array(bias).copy()
        changed[0] += 3
        bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
        onnx.save(model, str(copy / FORMATS[name].file))
    with pytest.raises(ValueError, match=rf"of it as {name} does not agree .* worst cosine -?0\.\d+, of text \d+ of 22"):
        check_format(copy, name, "it", TEXTS, expected)


def test_weights_that_are_rounded_too_coarsely_never_appear(exported, tmp_path, monkeypatch):
    _, student_dir, there = exported
    rounded = int8.in_rows
    monkeypatch.setattr(int8, "in_rows", lambda rows: (rounded(rows)[0] // 64 * 64, rounded(rows)[1]))
    monkeypatch.setattr(folder, "onnx_graph", lambda _: importlib.import_module("onnx").load(str(there / FORMATS["onnx"].file)))
    with pytest.raises(ValueError, match="as onnx-int8 does not agree with the student"):
        export(student_dir, tmp_path / "export", "onnx", "onnx-int8")
    assert names(tmp_path) == []


def test_files_of_students_and_exports_are_readable_by_whom_the_umask_lets(exported):
    _, student_dir, there = exported
    ours = 0o666 & ~current_umask()
    for each in (student_dir, there):
        assert {path.stat().st_mode & 0o777 for path in each.rglob("*") if path.is_file()} == {ours}


def test_an_export_that_does_not_agree_leaves_nothing_and_the_last_one_as_it_was(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder, head="tanh")
    export(tmp_path / "student", tmp_path / "export", card=lambda _: "the last one")
    heads = load_file(tmp_path / "student/heads.safetensors")
    heads["head.0.bias"][3] = torch.nan
    save_file(heads, tmp_path / "student/heads.safetensors")
    for out in ("export", "other"):
        with pytest.raises(ValueError, match="does not agree with the student: worst cosine nan, of text 0"):
            export(tmp_path / "student", tmp_path / out)
    assert (tmp_path / "export/README.md").read_text() == "the last one"
    assert names(tmp_path) == ["export", "student"]


def test_missing_packages_are_named_before_any_work(tmp_path, monkeypatch):
    found = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ValueError, match=r"\[onnx-int8\] needs the packages.* onnxruntime: .* quickstart,onnx"):
        export(tmp_path / "no student is looked for", tmp_path / "export", "onnx-int8")
    formats.require_packages([])
    assert names(tmp_path) == []


def test_what_a_killed_export_left_is_replaced_and_onnx_is_written_where_asked_for_alone(tiny_encoder, tmp_path):
    make_student(tmp_path / "student", tiny_encoder)
    (tmp_path / "export.part").mkdir()
    (tmp_path / "export.part/junk").touch()
    export(tmp_path / "student", tmp_path / "export")
    assert not (tmp_path / "export.part").exists() and not (tmp_path / "export/junk").exists()
    assert not (tmp_path / "export/onnx").exists()
