"""Texts per second of the training loader in one thread, and of what training consumes.

    python tests/bench/loader.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench

ours      ShardBatches: rows of a global batch read at random, sorted by length, tokenized, padded, with vectors and hashes
peer      sentence-transformers' loader over the same texts and vectors: random order, batches of --micro-batch
training  forward and backward of our batches, in one thread: the most that a rank consumes

They take turns; the result is the medians. Run nothing else meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from ckd_run import build_task, embedded_run, run_parser
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

from distill.run.allocator import keep_freed_memory
from distill.shards import ShardReader
from distill.training.batches import MicroBatch
from distill.training.task import Task


def peer_loader(model: str, reader: ShardReader, batch: int, max_length: int, folder: str) -> Any:
    """The loader that its trainer makes. Rows come as torch tensors, which is faster than its default of lists."""
    rows = np.arange(len(reader))
    vectors = reader.vectors(rows).astype(np.float32)
    dataset = Dataset.from_dict({"sentence": reader.texts(rows), "label": vectors}).with_format("torch")
    student = SentenceTransformer(model, device="cpu")
    student.max_seq_length = max_length
    arguments = SentenceTransformerTrainingArguments(
        folder, per_device_train_batch_size=batch, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = SentenceTransformerTrainer(student, arguments, train_dataset=dataset, loss=EmbedDistillLoss(student))
    return trainer.get_train_dataloader()


def train(task: Task, steps: list[list[MicroBatch]]) -> int:
    """Forward and backward of the steps' micro-batches; returns the number of texts."""
    for micro in steps:
        task.module.zero_grad()
        for part in micro:
            task.module.embed(part).sum().backward()
    return sum(len(part.positions) for micro in steps for part in micro)


def rate(work: Callable[[], int]) -> float:
    """Texts per second of `work`, which returns its number of texts."""
    started = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - started)


def main() -> None:
    keep_freed_memory()
    parser = run_parser(__doc__, num_texts=50_000, global_batch=1024, micro_batch=256)
    parser.add_argument("--train-steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ckd = {"global_batch": options.global_batch, "micro_batch": options.micro_batch, "queue": 0}
    config = embedded_run(options.work, options.model, options.text, options.num_texts, layers=options.layers, ckd=ckd)
    torch.set_num_threads(1)
    task = build_task(config)
    steps = range(task.steps_per_epoch)
    batches = [task.load(step) for step in islice(steps, options.train_steps + 1)]
    train(task, batches[:1])
    with tempfile.TemporaryDirectory() as folder:
        reader = ShardReader(config.run_dir / "shards")
        loader = peer_loader(options.model, reader, options.micro_batch, config.student.max_length, folder)
        works: dict[str, Callable[[], int]] = {
            "ours": lambda: sum(len(part.positions) for step in steps for part in task.load(step)),
            "peer": lambda: sum(len(batch["label"]) for batch in loader),
            "training": lambda: train(task, batches[1:]),
        }
        rates: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds):
            for name, work in works.items():
                rates[name].append(rate(work))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    result = {
        "texts": len(reader),
        "global_batch": options.global_batch,
        "micro_batch": options.micro_batch,
        "texts_per_second": {name: round(value, 1) for name, value in medians.items()},
        "rounds": {name: [round(value, 1) for value in found] for name, found in rates.items()},
        "ratio_to_peer": round(medians["ours"] / medians["peer"], 2),
        "ratio_to_training": round(medians["ours"] / medians["training"], 1),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
