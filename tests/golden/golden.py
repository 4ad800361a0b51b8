"""Golden results: what tiny CPU runs of every training stage compute, to compare two commits or to compare with stored values.

    python tests/golden/golden.py collect --tree DIR --out FILE.json     runs the code in DIR, writes its values
    python tests/golden/golden.py compare OLD.json NEW.json              bit for bit; prints the first difference of each name

The runs are fp32 on one thread a rank: one rank under ZeRO-0, two under ZeRO-2 with the sharded queue, two under ZeRO-3. Inputs
are generated with fixed generators that no version of torch changes. What is compared, by name:

    shards/<file>                      sha256 of every shard; shards/text and shards/teacher: the fingerprints of the manifest
    <setup>/<stage>/curves/<tag>       every scalar of TensorBoard that does not measure time or memory, {step: float32}
    <setup>/<stage>/weights/<tensor>   sha256 of the bytes of every tensor of the student that was kept
    results/<model>/...                results.json of the first setup, without what measures time

names.json maps the names that a commit before a renaming has to today's: pairs of a regular expression and its replacement.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertConfig, BertModel, BertTokenizerFast

HERE = Path(__file__).resolve().parent
SETUPS: dict[str, list[str]] = {
    "one_rank_zero0": [
        "stages=[precompute,ckd,simcse,finetune,hpd,export,evaluate]",
        "ckd.group_shuffling=true",
        "ckd.prefill=true",
    ],
    "two_ranks_zero2_sharded_queue": [
        "engine.num_ranks=2",
        f"engine.deepspeed={HERE}/zero2.json",
        "ckd.queue_placement=sharded",
        "hpd.queue_placement=sharded",
    ],
    "two_ranks_zero3": ["engine.num_ranks=2", f"engine.deepspeed={HERE}/zero3.json"],
}
STAGES = ("ckd", "simcse", "finetune", "hpd")
MEASURED = re.compile(  # differs from run to run
    r"curves/(time|memory|mfu|tokens|texts_per_second|sentences_a_second)|per_second|seconds|/params_per|resamples|index_bytes|/self$"
)
WORDS = (  # noqa: SIM905
    "the a of and to in is that for on with as by from at this are be it an was has model teacher student vector sentence "
    "learns reads gathers writes sends keeps small large deep shallow fast slow queue shard rank batch loss tensor key query"
).split()

Values = dict[str, Any]


def make_inputs(folder: Path) -> None:
    """Text, triplets, an STS set, a retrieval set, a teacher and an encoder to start from."""
    texts = make_texts(640, seed=0)
    (folder / "text.txt").write_text("\n".join(texts) + "\n")
    rows = ["anchor\tpositive\thard_negative"]
    rows += ["\t".join(texts[i : i + 3]) for i in range(0, 360, 3)]
    (folder / "triplets.tsv").write_text("\n".join(rows) + "\n")
    draw = random.Random(5)
    first, second = make_texts(50, seed=1), make_texts(50, seed=2)
    (folder / "sts").mkdir()
    for name in ("sts12_test", "stsb_dev"):
        pairs = "".join(f"{draw.uniform(0, 5):.2f}\t{a}\t{b}\n" for a, b in zip(first, second, strict=True))
        write_gz(folder / "sts" / f"{name}.tsv.gz", f"score\tsentence1\tsentence2\n{pairs}")
    (folder / "retrieval").mkdir()
    documents, queries = make_texts(120, seed=3), make_texts(20, seed=4)
    corpus = "".join(json.dumps({"_id": f"d{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(documents))
    write_gz(folder / "retrieval" / "corpus.jsonl.gz", corpus)
    asked = "".join(json.dumps({"_id": f"q{n}", "text": text}) + "\n" for n, text in enumerate(queries))
    write_gz(folder / "retrieval" / "queries.jsonl.gz", asked)
    judged = "".join(f"q{n}\td{draw.randrange(120)}\t{draw.choice([1, 2, 3])}\n" for n in range(20) for _ in range(3))
    (folder / "retrieval" / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    make_encoder(folder / "teacher", width=32, seed=0)
    make_encoder(folder / "encoder", width=24, seed=1)


def make_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) + "."] = None
    return list(found)


def write_gz(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_encoder(folder: Path, *, width: int, seed: int) -> None:
    """A BERT of three layers whose weights come from numpy's generator, which is the same on every processor."""
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS, *letters, *("##" + letter for letter in letters)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    BertTokenizerFast(vocab=str(vocabulary), model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(dict.fromkeys(pieces)),
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    draw = np.random.RandomState(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = draw.standard_normal(tuple(parameter.shape)) * (0.2 if parameter.ndim > 1 else 0.02)
        offset = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        parameter.data = torch.from_numpy(values + offset).float()
    model.save_pretrained(folder)


def collect(tree: Path, python: str = sys.executable, setups: Collection[str] = tuple(SETUPS)) -> Values:
    """The values of the code in `tree`; takes about two minutes. setups: of SETUPS, the first among them."""
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        make_inputs(folder)
        config = folder / "golden.yaml"  # with relative paths: the teacher's name is part of its fingerprint
        config.write_text((HERE / "golden.yaml").read_text().replace("FOLDER", ".").replace("GOLDEN", str(HERE)))
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        for setup in setups:
            command = [python, str(tree / "launcher/pipeline.py"), "--config", str(config), f"name={setup}", *SETUPS[setup]]
            done = subprocess.run(
                command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode:
                raise SystemExit(f"{setup}: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
        runs = folder / "runs"
        values = dict(shard_values(runs / "shared/shards"))
        for setup in setups:
            for stage in STAGES:
                values |= curves(runs / setup / "tensorboard" / stage, f"{setup}/{stage}/curves")
                values |= weights(runs / setup / stage / "student", f"{setup}/{stage}/weights")
        first = next(iter(SETUPS))
        results = json.loads((runs / first / "evaluate/results.json").read_text())
        values |= dict(leaves(results, "results"))
        return {name: value for name, value in sorted(values.items()) if not MEASURED.search(name)}


def shard_values(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.tar")):
        yield f"shards/{path.relative_to(folder)}", hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    yield "shards/text", manifest["text_fingerprint"]


def curves(folder: Path, prefix: str) -> Values:
    """Every scalar of a TensorBoard folder: {step: value}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        f"{prefix}/{tag}": {str(point.step): point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }


def weights(folder: Path, prefix: str) -> Values:
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                digests[f"{prefix}/{name}"] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return digests


def leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}/{key}")
    elif isinstance(tree, list) and len(tree) > 20:
        yield prefix, hashlib.sha256(json.dumps(tree).encode()).hexdigest()
    else:
        yield prefix, tree


def renamed(values: Values) -> Values:
    """The values under today's names, without those that names.json drops (a replacement of null)."""
    pairs = [(re.compile(old), new) for old, new in json.loads((HERE / "names.json").read_text())["names"]]
    found = {}
    for name, value in values.items():
        for old, new in pairs:
            if old.search(name):
                name = None if new is None else old.sub(new, name)
                if name is None:
                    break
        if name is not None:
            found[name] = value
    return found


def differences(old: Values, new: Values) -> list[str]:
    """One line for each name whose values are not the same bits, with the first step at which they differ."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            lines.append(f"{name}: only in the {'new' if name in new else 'old'} tree")
        elif old[name] != new[name]:
            a, b = old[name], new[name]
            if isinstance(a, dict) and isinstance(b, dict):
                step = next(s for s in sorted(a.keys() | b.keys(), key=int) if a.get(s) != b.get(s))
                lines.append(f"{name}: step {step}: {a.get(step)!r} -> {b.get(step)!r}")
            else:
                lines.append(f"{name}: {a!r} -> {b!r}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="run a tree and write its values")
    collecting.add_argument("--tree", type=Path, required=True)
    collecting.add_argument("--out", type=Path, required=True)
    comparing = commands.add_parser("compare", help="compare two files of values bit for bit")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "collect":
        values = collect(arguments.tree.resolve())
        arguments.out.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        print(f"{len(values)} values of {arguments.tree}")
        return 0
    old, new = (renamed(json.loads(path.read_text())) for path in (arguments.old, arguments.new))
    lines = differences(old, new)
    print("\n".join(lines) or f"{len(new)} values are the same, bit for bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
