"""launcher/search.py: which run it searches, and what it refuses. test_end_to_end.py searches a finished run."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from encoders import save_sentence_transformer
from sentence_transformers import SentenceTransformer

from distill.evaluation.model_encoder import encoder_of
from distill.evaluation.passage_index import PassageIndex, build_index
from distill.export.folder import exports_digests
from distill.run.files import write_json
from distill.shards import ShardReader
from distill.student.fingerprint import files_fingerprint
from launcher.search import search


def arguments(run, count=5):
    return argparse.Namespace(run=Path(run), count=count, asymmetric=False, question="which one?")


@pytest.mark.parametrize("name", ["2024", "on", "1.50"])
def test_a_run_is_found_by_its_directory_whatever_its_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("name: x\ntext: {sources: [text.txt]}\nteacher: {model: some/teacher}\n")
    monkeypatch.chdir(tmp_path / name)
    for run in (".", tmp_path / name):
        with pytest.raises(ValueError, match=f"nothing to search in {tmp_path / name}"):
            search(arguments(run))


def test_a_question_is_encoded_as_a_query_and_found_among_documents(embedded_copy, tiny_encoder, monkeypatch, capsys):
    _, run = embedded_copy
    model = save_sentence_transformer(
        tiny_encoder, run / "export/ckd", prompts={"query": "the query asks for ", "document": "a key of the queue "}
    )
    (run / "evaluate").mkdir()
    build_index(ShardReader(run / "shards"), encoder_of(model, device="cpu"), run / "evaluate", max_texts=100)
    write_json(run / "evaluate/DONE.json", {"results": {"index": "ckd"}})
    write_json(run / "export/DONE.json", {"fingerprint": files_fingerprint(exports_digests(run / "export"))})
    searched = []
    find = PassageIndex.search
    monkeypatch.setattr(PassageIndex, "search", lambda self, query, count: searched.append(query) or find(self, query, count))
    monkeypatch.setattr("launcher.search._read", lambda prompt: "")
    assert search(arguments(run)) == 0
    by_student, by_teacher = searched
    reference = SentenceTransformer(str(model), device="cpu")
    assert by_student == pytest.approx(reference.encode_query("which one?"), abs=1e-5)
    best = reference.encode_document(ShardReader(run / "shards").texts(range(100)), normalize_embeddings=True)
    score = float((best @ reference.encode_query("which one?", normalize_embeddings=True)).max())
    printed = capsys.readouterr().out
    assert f"  {score:.2f} " in printed or f"= {score:.2f} " in printed
    assert "student, 32 dimensions, 0.0M parameters, float32" in printed and len(by_teacher) == 32
    weights = run / "export/ckd/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"{run}/export: its files are not those that the stage export recorded"):
        search(arguments(run))


def test_a_damaged_index_is_refused_by_name(tmp_path, embedded_copy, tiny_encoder):
    _, run = embedded_copy
    model = save_sentence_transformer(tiny_encoder, run / "export/ckd")
    (run / "evaluate").mkdir()
    build_index(ShardReader(run / "shards"), encoder_of(model, device="cpu"), run / "evaluate", max_texts=100)
    write_json(run / "evaluate/DONE.json", {"results": {"index": "ckd"}})
    path = run / "evaluate/index.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"no {path}; run the pipeline to its evaluate stage"):
        search(arguments(run))
    assert path.with_name("index.npy.damaged").exists()


def test_no_run_and_no_answers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        search(arguments(tmp_path))
    with pytest.raises(ValueError, match="--count is 0: it must be at least 1"):
        search(arguments(tmp_path, count=0))
