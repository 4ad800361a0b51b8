"""launcher/evaluate.py: one process or several ranks, valid input and invalid, and two results compared."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
from commands import LAUNCHER, ROOT, call, environment
from conftest import WORDS
from distributed_ranks import free_port, start_ranks
from reference_times import hang_limit

from distill.run.collectives import rank

PLAIN = {"ndcg@10", "recall@10", "recall@100", "mrr@10"}


@pytest.fixture(scope="module")
def model(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("evaluated") / "model"
    SentenceTransformer(modules=[Transformer(str(tiny_encoder)), Pooling(32)], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An STS set, a retrieval set and a classification set of made-up sentences, all in one folder."""
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(3 + i % 5)) for i in range(60)]
    rows = [f"{i % 6}\t{texts[i]}\t{texts[(i * i) % 60]}" for i in range(60)]
    (folder / "stsb_test.tsv.gz").write_bytes(gzip.compress("\n".join(["score\tsentence1\tsentence2", *rows]).encode()))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": str(i), "text": x}) + "\n" for i, x in enumerate(texts)))
    queries = [{"_id": str(i), "text": " ".join(texts[i].split()[1:])} for i in range(20)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in range(20))]) + "\n")
    labelled = [f"{len(text.split()) % 2}\t{text}" for text in texts]
    for split, some in (("train", labelled), ("test", labelled[:20])):
        (folder / f"{split}.tsv").write_text("\n".join(["label\ttext", *some]) + "\n")
    return folder


def everything(model: Path, data: Path, out: Path) -> list[str | Path]:
    return ["--model", model, "--sts", data, "--retrieval", data, "--transfer", data, "--out", out, "--device", "cpu"]


def on_two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return subprocess.run(
        [*program, str(LAUNCHER / "evaluate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=hang_limit(),
    )


@pytest.fixture(scope="module")
def measured(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("out") / "new" / "whole.json"
    done = call("evaluate.py", *everything(model, data, out))
    assert done.returncode == 0, done.stdout
    return out, done.stdout


def same(ours: Any, theirs: Any) -> None:
    """Equal, floats to five decimals: a batch's padding moves a vector's last bits."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else theirs)


def test_results_are_written_whole_and_printed_as_tables(measured, data):
    out, printed = measured
    results = json.loads(out.read_text())
    assert (results["dim"], results["bytes_per_vector"]) == (32, 128)
    assert results["sts"]["AVG_OF"] == ["STSB"] and len(results["sts_resamples"]["STS AVG"]["values"]) == 1000
    assert set(results["retrieval"][data.name]) == PLAIN == set(results["retrieval_ci"][data.name])
    assert results["transfer"][data.name]["test"] == 20
    for part in ("(1 sets)", "STS16 is missing", "ndcg@10", "majority"):
        assert part in printed, printed
    assert [path.name for path in out.parent.iterdir()] == ["whole.json"]


def test_tasks_of_mteb_are_measured_from_files_and_its_own_results_are_beside(measured, model, data, tmp_path):
    out = tmp_path / "mteb.json"
    sets = [data, data / "stsb_test.tsv.gz"]
    done = call("evaluate.py", "--model", model, "--mteb", *sets, "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stdout
    scores, ours = json.loads(out.read_text())["mteb"], json.loads(measured[0].read_text())
    assert scores["stsb_test"] == pytest.approx(ours["sts"]["STSB"] / 100, abs=1e-4)
    assert scores[data.name] == pytest.approx(ours["retrieval"][data.name]["ndcg@10"], abs=0.02)  # ties
    assert "main score" in done.stdout
    assert {path.name for path in (tmp_path / "mteb.mteb").rglob("*.json")} >= {"stsb_test.json", f"{data.name}.json"}


def test_two_ranks_give_the_results_of_one_and_rank_0_alone_prints(measured, model, data, tmp_path):
    out = tmp_path / "shared.json"
    done = on_two_ranks(*everything(model, data, out))
    assert done.returncode == 0, done.stderr
    same(json.loads(out.read_text()), json.loads(measured[0].read_text()))
    assert done.stdout.count("results: ") == 1 and done.stdout.count("bytes/vector") >= 1
    assert done.stderr.count("STS16 is missing") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def _measure_until_rank_1_is_killed(arguments: list[str]) -> str:
    from distill.evaluation import model_encoder
    from launcher import command, evaluate

    args = evaluate.parse_args(arguments)
    if rank() == 1:
        model_encoder.encode_over_ranks = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        evaluate.measure(args)
    printed = io.StringIO()
    with redirect_stderr(printed), pytest.raises(command.Exit):
        evaluate.measure(args)
    return printed.getvalue()


def test_a_lost_rank_is_reported_with_the_folder_of_the_log_files(model, data, tmp_path):
    arguments = list(map(str, everything(model, data, tmp_path / "out.json")))
    processes, (pipe, _) = start_ranks(2, _measure_until_rank_1_is_killed, arguments)
    assert pipe.poll(hang_limit())
    succeeded, printed = pipe.recv()
    for process in processes:
        process.kill()
    assert succeeded and printed.startswith("error: ") and "lost rank 1 " in printed, printed
    logs = Path(re.search(r"logs: (\S+);", printed)[1])
    assert [path.name for path in sorted(logs.iterdir())] == [f"evaluate-rank-0000{rank}.log" for rank in range(2)]
    assert "lost rank 1" in (logs / "evaluate-rank-00000.log").read_text()


@pytest.mark.parametrize("stage", ["export", "evaluate"])
def test_a_finished_stage_is_skipped_with_one_line(finished, tmp_path, stage):
    config, directory, _ = finished
    shutil.copytree(directory, tmp_path / directory.name)
    done = call(f"{stage}.py", "--config", config, f"runs_dir={tmp_path}")
    assert (done.returncode, done.stdout) == (0, f"{stage}: done already; nothing it depends on has changed\n")


@pytest.mark.slow
def test_a_failure_on_rank_0_is_reported_once_and_ends_both(model, data, tmp_path):
    arguments = ["--model", model, "--sts", data / "nowhere", "--out", tmp_path / "out.json", "--device", "cpu"]
    done = on_two_ranks(*arguments)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line and "nowhere" in line] == [
        line for line in done.stderr.splitlines() if line.startswith("error: no STS sets")
    ]
    assert done.stderr.count("error: no STS sets") == 1, done.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_truncated_vectors_are_compared_with_the_whole_ones(measured, model, data, tmp_path):
    out = tmp_path / "short.json"
    arguments = ["--model", model, "--sts", data, "--retrieval", data, "--out", out, "--truncate-dim", 2, "--device", "cpu"]
    assert call("evaluate.py", *arguments).returncode == 0
    assert json.loads(out.read_text())["dim"] == 2
    done = call("evaluate.py", "--compare", measured[0], out)
    assert done.returncode == 0, done.stdout
    header, _, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["measure", "whole", "short"]
    assert [row.split("  ")[0] for row in rows] == ["STS AVG", f"{data.name} ndcg@10"]
    missing = call("evaluate.py", "--compare", out, tmp_path / "none.json")
    assert missing.returncode == 2 and "error: cannot read the results" in missing.stdout


@pytest.mark.slow
def test_quantised_vectors_go_through_faiss_or_it_says_what_to_install(model, data, tmp_path):
    arguments = ["--model", model, "--retrieval", data, "--out", tmp_path / "small.json", "--device", "cpu"]
    done = call("evaluate.py", *arguments, "--precision", "int8", "binary", "--index", "exact", "hnsw", "--rescore", 2)
    if importlib.util.find_spec("faiss") is None:
        assert done.returncode == 2 and "bash launcher/install.sh quickstart,retrieval" in done.stdout
        return
    assert done.returncode == 0, done.stdout
    scores = json.loads((tmp_path / "small.json").read_text())["retrieval"][data.name]
    vectors = {"int8", "int8+float32", "binary", "binary+int8", "binary+float32"}
    assert set(scores) == PLAIN | vectors | {f"hnsw-{each}" for each in vectors}
    assert scores["int8"]["index_bytes"] > 60 * 32 and scores["hnsw-binary"]["M"] == 32
    assert "queries/s, one by one" in done.stdout and "difference to float32" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--model": "/no/such/model"}, "no model at /no/such/model"),
        ({"--sts": "/no/such/sts"}, "no STS sets in /no/such/sts"),
        ({"--out": "/"}, "is a folder"),
        ({"--out": "/dev/null/no/file.json"}, "cannot write --out /dev/null/no/file.json"),
        ({"--device": "teapot"}, "'teapot' is not a device"),
        ({"--batch-size": "0"}, "--batch-size 0 must be 1 or more"),
        ({"--rescore": "4"}, "of --retrieval, which is not given"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(model, data, tmp_path, wrong, message):
    right = {"--model": model, "--sts": data, "--out": tmp_path / "results.json"}
    done = call("evaluate.py", *(part for option in (right | wrong).items() for part in option))
    assert done.returncode == 2
    assert done.stdout.startswith("error: ") and message in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())
