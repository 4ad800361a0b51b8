"""Training on stored teacher vectors and sentence-transformers' trainer: the same student, text and cores, in bf16, in one run.

    python tests/bench/train.py --model MODELS/minilm-l6 --text DATA/unlabelled/wiki1m_en.txt.gz --work /tmp/bench

ours      the CKD stage: one process per rank, one optimizer step per global batch
defaults  SentenceTransformerTrainer with EmbedDistillLoss, the vectors as its dataset's label column, batches of 256 per device
grouped   the same with transformers' LengthGroupedSampler as its batch sampler, which its trainer does not offer
bare      forward and backward of our micro-batches, loaded before: no engine, optimizer or communication; the loss is a sum

sentence-transformers runs on as many ranks as ours (DDP over gloo) or in one process with all threads: whichever is faster on
a sample, chosen for `defaults` and `grouped` separately. All train a student without dropout and with the same maximum length.
The time is that of an epoch, from its first batch to its last step: ours without the first steps, the peer's after a short
epoch to warm up. They take turns; the result is the medians. Run nothing else meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ckd_run import CPU, StepTimer, build_task, ckd_stage, delete_training, embedded_run, join_ranks, on_ranks, run_parser
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from distill.config import RunConfig
from distill.run.precision import autocast_dtype
from distill.run.sampling import permutation
from distill.shards import ShardReader
from distill.student.encoder import keep_layers, set_dropout

FIRST_STEPS = 2  # of ours, in which kernels are chosen; not counted


def our_rank(rank: int, world_size: int, port: int, threads: int, config: RunConfig) -> dict[str, Any]:
    join_ranks(rank, world_size, port, threads)
    timer = StepTimer()
    ckd_stage(config).run(CPU)
    dist.destroy_process_group()
    return timer.metrics(FIRST_STEPS)


def bare_rank(rank: int, world_size: int, port: int, threads: int, config: RunConfig) -> dict[str, Any]:
    join_ranks(rank, world_size, port, threads)
    task = build_task(config)
    steps = [task.load(step) for step in range(task.steps_per_epoch)]
    masks = [chunk["attention_mask"] for micro in steps for part in micro for chunk in part.tokens]
    dist.barrier()
    for number, micro in enumerate(steps):
        if number == FIRST_STEPS:
            started = time.perf_counter()
        task.module.zero_grad()
        for part in micro:
            task.module.embed(part).sum().backward()
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    tokens, padded = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return {"seconds_per_step": seconds / (len(steps) - FIRST_STEPS), "tokens": tokens, "padded": padded}


class CountingLoss(EmbedDistillLoss):
    """Counts real and padded tokens."""

    tokens = padded = 0

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        features = list(sentence_features)
        for feature in features:
            self.tokens += int(feature["attention_mask"].sum())
            self.padded += feature["attention_mask"].numel()
        return super().forward(features, labels)


class EpochClock(TrainerCallback):
    started = ended = 0.0

    def on_epoch_begin(self, *arguments: Any, **options: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.ended = time.perf_counter()


def group_by_length(dataset: Dataset, batch_size: int, drop_last: bool, generator: Any, **_: Any) -> DefaultBatchSampler:
    lengths = [len(text) for text in dataset["sentence"]]
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
    return DefaultBatchSampler(sampler, batch_size=batch_size, drop_last=drop_last)


def peer_rank(
    rank: int, world_size: int, port: int, threads: int, config: RunConfig, count: int, batch: int, grouped: bool
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate would take all cores on every rank
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    reader = ShardReader(config.run_dir / "shards")
    rows = permutation(len(reader), config.seed)[:count]
    vectors = reader.vectors(rows).astype(np.float32)
    dataset = Dataset.from_dict({"sentence": reader.texts(rows), "label": vectors}).with_format("torch")
    model = SentenceTransformer(config.teacher.model, device="cpu")
    encoder = model[0].model
    keep_layers(encoder, config.student.kept(encoder.config.num_hidden_layers))
    set_dropout(encoder, 0.0)
    model.max_seq_length = config.student.max_length
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            bf16=autocast_dtype("auto", CPU) is not None,
            use_cpu=True,
            ddp_backend="gloo" if world_size > 1 else None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"batch_sampler": group_by_length} if grouped else {}),
        )
        for part in (dataset.select(range(2 * batch * world_size)), dataset):
            loss, clock = CountingLoss(model), EpochClock()
            trainer = SentenceTransformerTrainer(model, arguments, train_dataset=part, loss=loss, callbacks=[clock])
            trainer.train()
    assert trainer.args.world_size == world_size
    if world_size > 1:
        dist.destroy_process_group()
    return {"seconds": clock.ended - clock.started, "tokens": loss.tokens, "padded": loss.padded}


def total(ranks: list[dict[str, Any]], name: str) -> int:
    return sum(rank[name] for rank in ranks)


class Peer:
    """sentence-transformers on the ranks and threads that are faster on a sample."""

    def __init__(self, config: RunConfig, ranks: int, cores: int, batch: int, sample: int, *, grouped: bool) -> None:
        self.config, self.batch, self.grouped = config, batch, grouped
        ways = {
            f"{ranks} ranks, {cores // ranks} threads each": (ranks, cores // ranks),
            f"1 process, {cores} threads": (1, cores),
        }
        self.rates = {name: sample / self.run(way, sample)[0] for name, way in ways.items()}
        self.name = max(self.rates, key=self.rates.__getitem__)
        self.way = ways[self.name]

    def run(self, way: tuple[int, int], count: int) -> tuple[float, float]:
        """Seconds of an epoch over `count` texts, and the fraction of tokens that are not padding."""
        ranks = on_ranks(peer_rank, way[0], way[1], self.config, count, self.batch, self.grouped, keeps_freed_memory=False)
        return max(rank["seconds"] for rank in ranks), total(ranks, "tokens") / total(ranks, "padded")


def main() -> None:
    parser = run_parser(__doc__, num_texts=50_000, global_batch=1024, micro_batch=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--queue", type=int, default=16_384)
    parser.add_argument("--peer-batch", type=int, default=256, help="texts per device and step")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    ckd = {"global_batch": options.global_batch, "micro_batch": options.micro_batch, "queue": options.queue}
    config = embedded_run(options.work, options.model, options.text, options.num_texts, layers=options.layers, ckd=ckd)

    both = options.ranks * options.peer_batch  # an even number of batches for every rank
    available = len(ShardReader(config.run_dir / "shards", verify=False)) // both * both
    sample = max(4 * both, available // 8 // both * both)
    peers = {
        name: Peer(config, options.ranks, cores, options.peer_batch, sample, grouped=name == "grouped")
        for name in ("defaults", "grouped")
    }
    print({name: {way: round(rate, 1) for way, rate in peer.rates.items()} for name, peer in peers.items()}, flush=True)
    rates: dict[str, list[float]] = {name: [] for name in ("ours", "bare", *peers)}
    padding: dict[str, float] = {}
    step: dict[str, Any] = {}
    for _ in range(options.rounds):
        delete_training(config)
        ranks = on_ranks(our_rank, options.ranks, cores // options.ranks, config)
        rates["ours"].append(options.global_batch / ranks[0]["seconds_per_step"])
        step = ranks[0]
        ranks = on_ranks(bare_rank, options.ranks, cores // options.ranks, config)
        rates["bare"].append(options.global_batch / max(rank["seconds_per_step"] for rank in ranks))
        padding["ours"] = total(ranks, "tokens") / total(ranks, "padded")
        for name, peer in peers.items():
            seconds, padding[name] = peer.run(peer.way, available)
            rates[name].append(available / seconds)
        print({name: [round(rate, 1) for rate in found] for name, found in rates.items()}, flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    result = {
        "model": Path(options.model).name,
        "layers": options.layers,
        "texts": available,
        "ranks": options.ranks,
        **ckd,
        "peer_batch": options.peer_batch,
        "texts_per_second": {name: round(rate, 1) for name, rate in medians.items()},
        "rounds": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "peer_runs_on": {name: peer.name for name, peer in peers.items()},
        "ratio_to_defaults": round(medians["ours"] / medians["defaults"], 2),
        "ratio_to_grouped": round(medians["ours"] / medians["grouped"], 2),
        "step_over_bare": round(medians["bare"] / medians["ours"], 3),
        "padding_efficiency": {name: round(value, 4) for name, value in padding.items()},
        "fraction_of_step": step["fraction_of_step"],
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
