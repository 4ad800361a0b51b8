"""Texts with roles: each is embedded, stored, trained on and evaluated with the prompt of its role."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import sentences
from distributed_ranks import on_ranks
from engines import CPU, train_stage
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from distill.config import load_config, stage_of
from distill.metrics.fidelity import rows_by_role
from distill.run.files import read_json
from distill.shards import Manifest, ShardError, ShardReader, verify_all
from distill.student import Student
from distill.teacher.encoder import Teacher, describe_prompts
from distill.training.batches import Tokenized

PROMPTS = {"query": "find the: ", "document": "", "passage": "read: "}
QUERIES, DOCUMENTS, OTHERS = sentences(120), [f"{text} again" for text in sentences(120, seed=1)], sentences(60, seed=2)


@pytest.fixture
def config(tiny_encoder, tmp_path):
    """A run with queries, documents, texts of a prompt of their own, and texts of no role."""
    transformer = Transformer(str(tiny_encoder), max_seq_length=32)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    SentenceTransformer(modules=[transformer, pooling], device="cpu", prompts=PROMPTS).save(str(tmp_path / "model"))
    for name, texts in (("queries", QUERIES), ("documents", DOCUMENTS), ("others", OTHERS), ("asked", OTHERS[::-1])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {text}\n" for text in texts))
    path = tmp_path / "run.yaml"
    path.write_text(f"""
name: roles
runs_dir: {tmp_path / "runs"}
text:
  sources:
    - {{type: file, path: {tmp_path / "queries.txt"}, role: query}}
    - {{type: file, path: {tmp_path / "documents.txt"}, role: document}}
    - {{type: file, path: {tmp_path / "others.txt"}}}
    - {{type: file, path: {tmp_path / "asked.txt"}, role: query, prompt: "question: "}}
teacher: {{model: {tmp_path / "model"}, precision: fp32}}
shards: {{rows: 128, block_rows: 32}}
student: {{layers: [0, 2]}}
ckd: {{global_batch: 32, micro_batch: 16, queue: 64, max_steps: 2}}
engine: {{precision: fp32}}
stages: [precompute, ckd, export, evaluate]
""")
    return path


def embedded(config, *overrides):
    loaded = load_config(config, list(overrides))
    assert stage_of(loaded, "precompute").run(CPU)
    return loaded


def expected_prompt(text):
    name = text.split()[0]
    return {"queries": "find the: ", "documents": "read: ", "others": "", "asked": "question: "}[name]


def test_each_text_is_embedded_with_the_prompt_of_its_source_and_the_shards_say_what_it_is(config, tmp_path):
    loaded = embedded(config)
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    for folder in (loaded.shards_dir, loaded.shards_dir / "held_out"):
        reader = ShardReader(folder)
        rows = np.arange(len(reader))
        texts = reader.texts(rows)
        prompted = [expected_prompt(text) + text for text in texts]
        vectors = model.encode(prompted, prompt="", normalize_embeddings=True)
        assert np.abs(reader.vectors(rows) - vectors).max() < 1e-3
        roles = {"queries": "query", "documents": "document", "others": None, "asked": "query"}
        assert reader.roles(rows) == [roles[text.split()[0]] for text in texts]
        names = [source.name for source in reader.manifest.sources]
        assert names == ["queries.txt", "documents.txt", "others.txt", "asked.txt"]
        assert [names[number].removesuffix(".txt") for number in reader.sources(rows)] == [text.split()[0] for text in texts]
        assert verify_all(folder) == [] and Manifest.load(folder).recipe()["sources"][0] == {"name": names[0], "role": "query"}
        text, vector = reader[3]
        assert (text, vector.shape) == (texts[3], (reader.dim,))


def test_the_prompts_and_those_that_are_not_used_are_said_in_one_line(config, tmp_path):
    loaded = load_config(config)
    teacher = Teacher(loaded.teacher, CPU, None, sources=loaded.text.sources)
    assert describe_prompts(teacher, loaded.text.sources) == [
        "prompts: queries.txt 'find the: ', documents.txt 'read: ', others.txt '', asked.txt 'question: '"
    ]
    plain = load_config(config, [f"text.sources={tmp_path / 'others.txt'}"]).text.sources
    assert describe_prompts(teacher, plain) == [
        f"no prompt is put before the texts, though {tmp_path / 'model'} has passage, query: text.sources[].role,"
        " teacher.prompt_name or teacher.prompt chooses one"
    ]


def test_one_source_without_a_role_leaves_the_shards_as_they_were(config, tmp_path):
    loaded = embedded(config, f"text.sources={tmp_path / 'others.txt'}")
    assert b"source.npy" not in (loaded.shards_dir / "000000.tar").read_bytes()
    assert "sources" not in json.loads((loaded.shards_dir / "manifest.json").read_text())
    reader = ShardReader(loaded.shards_dir)
    assert reader.roles([0, 1]) == [None, None] and reader.sources([0, 1]).tolist() == [0, 0]


def test_a_flipped_source_number_is_found(config):
    loaded = embedded(config)
    path = loaded.shards_dir / "000000.tar"
    data = bytearray(path.read_bytes())
    data[data.find(b".source.npy\0") // 512 * 512 + 512 + 128] ^= 1
    path.write_bytes(data)
    assert "source.npy" in str(verify_all(loaded.shards_dir)[0])
    with pytest.raises(ShardError, match=r"000000\.tar"):
        ShardReader(loaded.shards_dir).sources([0])


def test_a_student_reads_each_text_with_its_own_prompt_of_the_role(config):
    loaded = embedded(config)
    assert on_ranks(1, train_stage, config, "ckd")[0]["steps"] == 2
    for stage in ("export", "evaluate"):
        assert stage_of(loaded, stage).run(CPU)
    results = read_json(loaded.run_dir / "evaluate/results.json")
    assert (
        results["ckd"]["fidelity_by_role"].keys() <= {"query", "document"}
        and results["teacher"]["fidelity"]["spearman"] > 0.999
    )
    student, reader = Student.load(loaded.run_dir / "ckd/student").eval(), ShardReader(loaded.shards_dir)
    rows = np.arange(0, len(reader), 9)
    texts = reader.texts(rows)
    own = {"query": "find the: ", "document": "read: ", None: ""}
    prompted = [own[role] + text for role, text in zip(reader.roles(rows), texts, strict=True)]
    plain = [student._fast_tokenizer.encode(text).ids for text in prompted]
    assert Tokenized(reader, student).read(rows) == plain
    assert len(set(reader.roles(rows))) == 3
    assert np.allclose(student.encode(texts, roles=reader.roles(rows)), student.encode(prompted), atol=1e-6)


def test_an_untrained_copy_has_a_fidelity_of_one_with_its_prompts_and_less_without(config):
    loaded = embedded(config)
    held_out = ShardReader(loaded.shards_dir / "held_out")
    texts, roles = held_out.texts(range(len(held_out))), held_out.roles(range(len(held_out)))
    rows = [row for row, text in enumerate(texts) if not text.startswith("asked")]  # of which only the teacher has the prompt
    for overrides, is_same in (([], True), (["student.prompts={}"], False)):
        student = stage_of(load_config(config, ["student.layers=null", *overrides]), "ckd").setup(CPU, None).student.eval()
        vectors = student.encode([texts[row] for row in rows], roles=[roles[row] for row in rows])
        cosines = (vectors * held_out.vectors(rows)).sum(axis=1)
        assert bool(cosines.min() > 0.999) == is_same


def test_fidelity_is_measured_among_the_texts_of_each_role_as_well():
    assert rows_by_role(["query", None, "query", "document", "query"]) == {"query": [0, 2, 4]}
    assert rows_by_role([None] * 9) == {} == rows_by_role(["query"] * 9)
