"""Retrieval of models with and without prompts gives the values of sentence-transformers' evaluator and of trec_eval."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sentences
from encoders import save_sentence_transformer
from retrieval_sets import write_folder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from distill.corpus.evaluation_sets import RetrievalSet, read_retrieval
from distill.evaluation.index_types import index_types
from distill.evaluation.model_encoder import encoder_of
from distill.evaluation.passage_index import build_index
from distill.evaluation.retrieval import retrieval_scores
from distill.shards import ShardReader
from distill.teacher.encoder import Teacher
from distill.teacher.teacher_config import TeacherConfig

CPU = torch.device("cpu")
PROMPTS = {"query": "the query asks for ", "document": "a key of the queue "}
CASES = {
    "none": {},
    "both": {"prompts": PROMPTS},
    "query alone": {"prompts": {"query": PROMPTS["query"]}},
    "default": {"prompts": {**PROMPTS, "other": "teacher and student "}, "default_prompt_name": "other"},
    "default alone": {"prompts": {"other": "teacher and student "}, "default_prompt_name": "other"},
}


@pytest.fixture(scope="module", params=CASES)
def model(request, tiny_encoder, tmp_path_factory) -> str:
    """A sentence-transformers folder with the prompts of a case."""
    return str(save_sentence_transformer(tiny_encoder, tmp_path_factory.mktemp("prompted") / "model", **CASES[request.param]))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> RetrievalSet:
    """100 sentences, and 25 queries with four relevant documents each."""
    documents = [(str(number), "", text) for number, text in enumerate(sentences(100))]
    queries = [(str(number), " ".join(documents[4 * number][2].split()[:4])) for number in range(25)]
    qrels = "".join(f"{number}\t{4 * number + other}\t1\n" for number in range(25) for other in range(4))
    return read_retrieval(write_folder(tmp_path_factory.mktemp("retrieval"), qrels, documents=documents, queries=queries))


def by_sentence_transformers(model: SentenceTransformer, given: RetrievalSet) -> dict[str, float]:
    relevant = {query: set(grades) for query, grades in given.grades.items()}
    evaluator = InformationRetrievalEvaluator(
        given.queries, given.documents, relevant, precision_recall_at_k=[10, 100], write_csv=False
    )
    found = evaluator(model)
    return {name: found[f"cosine_{name}"] for name in ("ndcg@10", "recall@10", "recall@100", "mrr@10")}


def test_a_model_is_measured_with_its_own_prompts_as_sentence_transformers_does(model, made):
    ours = retrieval_scores(encoder_of(model, device="cpu"), {"made": made}, bootstrap=0)["retrieval"]["made"]
    assert ours == pytest.approx(by_sentence_transformers(SentenceTransformer(model, device="cpu"), made), abs=5e-5)


def test_the_teacher_takes_the_prompts_that_its_model_has_unless_the_config_names_one(model):
    texts, reference = sentences(9), SentenceTransformer(model, device="cpu")
    teacher = Teacher(TeacherConfig(model=model), CPU, None)
    for side, encode in ((None, reference.encode), ("query", reference.encode_query), ("document", reference.encode_document)):
        assert teacher(texts, side) == pytest.approx(encode(texts, normalize_embeddings=True), abs=1e-3)
    for named in ({"prompt": "the loss "}, *([{"prompt_name": "query"}] if reference.prompts["query"] else [])):
        teacher = Teacher(TeacherConfig(model=model, **named), CPU, None)
        assert (teacher(texts, "query") == teacher(texts, "document")).all()
        assert (teacher(texts, "query") == teacher(texts)).all()


def test_the_index_has_documents_with_their_prompt(tiny_encoder, embedded_once, tmp_path):
    model = save_sentence_transformer(tiny_encoder, tmp_path / "model", prompts=PROMPTS)
    reader = ShardReader(embedded_once / "runs/tiny/shards")
    build_index(reader, encoder_of(model, device="cpu"), tmp_path, max_texts=20)
    expected = SentenceTransformer(str(model), device="cpu").encode_document(
        reader.texts(np.arange(20)), normalize_embeddings=True
    )
    assert np.load(tmp_path / "index.npy") == pytest.approx(expected, abs=2e-3)


def test_a_document_prompt_that_sentence_transformers_does_not_take_is_a_warning(tiny_encoder, tmp_path, caplog):
    unused = {"query": "query: ", "passage": "passage: "}
    for name, prompts in (("unused", unused), ("used", {**unused, "document": "passage: "})):
        encoder_of(save_sentence_transformer(tiny_encoder, tmp_path / name, prompts=prompts), device="cpu")
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("distill"))
    assert "unused: its prompt 'passage' is not put before documents" in warning


def part_of(data: Path, name: str, folder: Path, num_queries: int, num_documents: int) -> RetrievalSet:
    """A set of DISTILL_DATA with its first queries, their relevant documents and further ones."""
    place = data / "retrieval" / name
    qrels = [line.split("\t") for line in (place / "qrels.tsv").read_text().splitlines()[1:]]
    kept = list(dict.fromkeys(query for query, _, grade in qrels if int(grade) > 0))[:num_queries]
    qrels = [row for row in qrels if row[0] in kept]
    needed = {document for _, document, _ in qrels}
    rows, asked = (
        [json.loads(line) for line in gzip.decompress((place / f"{part}.jsonl.gz").read_bytes()).splitlines()]
        for part in ("corpus", "queries")
    )
    rest = [row["_id"] for row in rows if row["_id"] not in needed]
    needed |= set(rest[: max(0, num_documents - len(needed))])
    documents = [(row["_id"], row["title"], row["text"]) for row in rows if row["_id"] in needed]
    queries = [(row["_id"], row["text"]) for row in asked]
    lines = "".join("\t".join(row) + "\n" for row in qrels)
    return read_retrieval(write_folder(folder, lines, documents=documents, queries=queries))


def model_at_hand(name: str) -> str:
    folder = Path(os.environ.get("DISTILL_MODELS", "")) / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"DISTILL_MODELS/{name} is not there")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_documents"), [("minilm-l6", 400), pytest.param("me5-small", 100, marks=pytest.mark.soak)]
)
def test_cacm_gives_the_value_of_sentence_transformers_to_four_decimals(data, tmp_path, name, num_documents):
    given = part_of(data, "cacm", tmp_path, 30, num_documents)
    folder = model_at_hand(name)
    ours = retrieval_scores(encoder_of(folder, device="cpu"), {"cacm": given}, bootstrap=0)["retrieval"]["cacm"]
    theirs = by_sentence_transformers(SentenceTransformer(folder, device="cpu"), given)
    assert round(ours["ndcg@10"], 4) == round(theirs["ndcg@10"], 4)


@pytest.mark.slow
def test_graded_judgements_give_the_value_of_trec_eval_to_four_decimals(data, tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    given = part_of(data, "cranfield", tmp_path, 40, 400)
    encode = encoder_of(model_at_hand("minilm-l6"), device="cpu")
    ours = retrieval_scores(encode, {"cranfield": given}, bootstrap=0)["retrieval"]["cranfield"]
    queries, documents = encode(list(given.queries.values()), "query"), encode(list(given.documents.values()), "document")
    cosines = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (documents / np.linalg.norm(documents, axis=1)[:, None]).T
    run = {
        query: dict(zip(given.documents, row.tolist(), strict=True)) for query, row in zip(given.queries, cosines, strict=True)
    }
    theirs = pytrec_eval.RelevanceEvaluator(given.grades, {"ndcg_cut_10", "recall_10"}).evaluate(run)
    assert {grade for grades in given.grades.values() for grade in grades.values()} > {1, 2}
    for measure, name in (("ndcg@10", "ndcg_cut_10"), ("recall@10", "recall_10")):
        assert ours[measure] == pytest.approx(np.mean([scores[name] for scores in theirs.values()]), abs=5e-5)


@pytest.fixture(scope="module", params=["minilm-l6", "me5-small", "bert-tiny with prompts"])
def real_model(request, tmp_path_factory) -> str:
    name, _, prompted = request.param.partition(" with ")
    folder = model_at_hand(name)
    if not prompted:
        return folder
    return str(save_sentence_transformer(Path(folder), tmp_path_factory.mktemp("real") / "model", prompts=PROMPTS))


def without_copies(given: RetrievalSet) -> RetrievalSet:
    """A set without documents whose text another one has: of equal scores, the peer takes whichever comes first."""
    first: dict[str, str] = {}
    for name, text in given.documents.items():
        first.setdefault(text, name)
    kept = set(first.values())
    grades = {query: {name: grade for name, grade in each.items() if name in kept} for query, each in given.grades.items()}
    grades = {query: each for query, each in grades.items() if each}
    queries = {query: given.queries[query] for query in grades}
    return given._replace(
        documents={name: text for name, text in given.documents.items() if name in kept}, queries=queries, grades=grades
    )


@pytest.mark.soak
@pytest.mark.parametrize("name", ["cacm", "npl_vaswani"])
def test_whole_sets_give_the_value_of_sentence_transformers_to_four_decimals(data, real_model, name):
    given = without_copies(read_retrieval(data / "retrieval" / name))
    ours = retrieval_scores(encoder_of(real_model, device="cpu"), {name: given}, bootstrap=0)["retrieval"][name]
    theirs = by_sentence_transformers(SentenceTransformer(real_model, device="cpu"), given)
    print(f"{real_model} {name}: ndcg@10 {ours['ndcg@10']:.4f}, sentence-transformers {theirs['ndcg@10']:.4f}")
    assert round(ours["ndcg@10"], 4) == round(theirs["ndcg@10"], 4)


@pytest.mark.soak
def test_a_whole_graded_set_gives_the_value_of_trec_eval_to_four_decimals(data, real_model):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    given, encode = read_retrieval(data / "retrieval/cranfield"), encoder_of(real_model, device="cpu")
    ours = retrieval_scores(encode, {"cranfield": given}, bootstrap=0)["retrieval"]["cranfield"]
    queries, documents = encode(list(given.queries.values()), "query"), encode(list(given.documents.values()), "document")
    cosines = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (documents / np.linalg.norm(documents, axis=1)[:, None]).T
    run = {
        each: dict(zip(given.documents, row.tolist(), strict=True)) for each, row in zip(given.queries, cosines, strict=True)
    }
    scores = pytrec_eval.RelevanceEvaluator(given.grades, {"ndcg_cut_10"}).evaluate(run)
    theirs = float(np.mean([score["ndcg_cut_10"] for score in scores.values()]))
    print(f"{real_model} cranfield: ndcg@10 {ours['ndcg@10']:.4f}, trec_eval {theirs:.4f}")
    assert round(ours["ndcg@10"], 4) == round(theirs, 4)


@pytest.mark.soak
def test_the_order_of_the_corpus_changes_no_metric_of_a_whole_set(data, tmp_path):
    place, scores = data / "retrieval/cacm", []
    encode = encoder_of(model_at_hand("bert-tiny"), device="cpu")
    corpus = gzip.decompress((place / "corpus.jsonl.gz").read_bytes()).splitlines(keepends=True)
    for number, lines in enumerate((corpus, corpus[::-1])):
        folder = tmp_path / str(number) / "cacm"
        folder.mkdir(parents=True)
        (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
        for name in ("queries.jsonl.gz", "qrels.tsv"):
            (folder / name).write_bytes((place / name).read_bytes())
        types = index_types(("exact",), ("int8", "binary"), 4)
        found = retrieval_scores(encode, {"cacm": read_retrieval(folder)}, types=types, bootstrap=0)["retrieval"]["cacm"]
        scores.append({key: _without_costs(value) for key, value in found.items()})
    assert scores[0] == scores[1] and "binary" in scores[0]


def _without_costs(value: object) -> object:
    kept = ("ndcg", "recall", "mrr")
    return {key: each for key, each in value.items() if key.startswith(kept)} if isinstance(value, dict) else value
