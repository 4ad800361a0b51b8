"""finetune: supervised contrastive fine-tuning on triplets.

Where a user has no labels, triplets are mined from the shards: the teacher's near neighbours are positives, mid-rank ones hard
negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pydantic import model_validator
from transformers import PretrainedConfig

from distill.corpus import read_dataset, text_hash
from distill.corpus.rows import read_numbered_rows
from distill.corpus.sources import dataset_fingerprint
from distill.run.collectives import any_rank, rank
from distill.run.config import FileName, result
from distill.run.prompts import Role
from distill.run.recorded_array import is_saved, save_array
from distill.run.sampling import SampleSource, first_of_permutation
from distill.run.stopping import CheckStop, never
from distill.shards import ShardReader
from distill.training.contrast import ContrastConfig, ContrastTask, build_contrast_task, check_contrast
from distill.training.training_stage import Setup, TrainingStage

ANCHORS_PER_BLOCK = 1024
CHECKED_TRIPLETS = 10_000  # that are read before any stage has run


class FinetuneConfig(ContrastConfig):
    """Supervised contrastive fine-tuning on (anchor, positive, hard negative)."""

    lr: float = result(5e-5, gt=0, description="as in the section ckd")
    init: str = result(
        "ckd", description="the task whose student is fine-tuned; student: the encoder that the section student describes"
    )
    triplets: FileName | None = result(
        None, description="a .tsv, .csv, .jsonl or .parquet file; null mines them from the shards"
    )
    fields: tuple[str, str, str] = result(("anchor", "positive", "hard_negative"), description="their columns in it")
    roles: tuple[Role | None, Role | None, Role | None] = result(
        (None, None, None),
        description="what the texts of those columns are, for the student's prompts, e.g. [query, document, document]; mined"
        " ones have the roles of their sources",
    )
    dataset: FileName | None = result(
        None, description="instead of a file: the name of a Hugging Face dataset with these columns"
    )
    subset: str | None = result(None, description="dataset: its configuration")
    split: str = result("train", description="dataset: its split")
    revision: str | None = result(None, description="dataset: its commit; null: that of its main branch when the stage begins")
    limit: int | None = result(None, gt=0, description="read at most this number of triplets")
    num_mined: int = result(20_000, gt=0, description="triplets to mine where there is no file")
    mining_pool: int = result(50_000, gt=0, description="texts among which neighbours are mined")
    positive_range: tuple[float, float] = result((0.6, 0.98), description="teacher cosine of a mined positive")
    negative_rank: int = result(50, gt=1, description="a mined hard negative is the neighbour of this rank")

    @model_validator(mode="after")
    def _has_one_source(self) -> FinetuneConfig:
        if self.triplets is not None and self.dataset is not None:
            raise ValueError("finetune.triplets and finetune.dataset are both given; leave one out")
        low, high = self.positive_range
        if not -1 <= low < high <= 1:
            raise ValueError(f"finetune.positive_range [{low}, {high}] must be two cosines from -1 to 1, the lower one first")
        return self


class Triplets:
    """(anchor, positive, hard negative) in memory. roles: of the three texts, a list for each triplet, or one for all."""

    num_views = 3
    mixture: Sequence[SampleSource] = ()
    source_names: Sequence[str] = ()

    def __init__(self, triplets: Sequence[tuple[str, ...]], roles: Sequence[Sequence[Role | None]]) -> None:
        self.triplets = triplets
        self._roles = roles
        self.shard_rows = np.array([len(triplets)])
        self._lengths = np.array([sum(len(text) for text in triplet) for triplet in triplets])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._lengths[rows]

    def views(self, rows: np.ndarray) -> list[list[str]]:
        return [[self.triplets[row][view] for row in rows] for view in range(self.num_views)]

    def hashes(self, rows: np.ndarray) -> np.ndarray:
        return np.array([[text_hash(text) for text in self.triplets[row]] for row in rows], np.int64).reshape(
            -1, self.num_views
        )

    def roles(self, rows: np.ndarray) -> list[list[Role | None]]:
        return [[self._roles[row % len(self._roles)][view] for row in rows] for view in range(self.num_views)]

    def sources(self, rows: np.ndarray) -> None:
        return None


class FinetuneStage(TrainingStage):
    name = "finetune"
    config_class = FinetuneConfig
    title = "supervised contrastive fine-tuning"
    selects_by_sts = True

    def inputs(self) -> dict[str, str]:
        found, config = super().inputs(), self.section(FinetuneConfig)
        if config.triplets:
            found[config.triplets] = self.digest(Path(config.triplets))
        elif config.dataset:
            found["dataset"] = self._recorded(config)
            if not found["dataset"]:
                content = dataset_fingerprint(config.dataset, config.revision, self.digests)
                found["dataset"] = f"{_dataset_name(config)} {content}".strip()
        return found

    def _recorded(self, config: FinetuneConfig) -> str:
        """The input of a dataset on the hub without a revision as the stage recorded it when it began; '' if it has not."""
        recorded = self.recorded_inputs().get("dataset", "")
        is_unpinned = not config.revision and not Path(str(config.dataset)).is_dir()
        return recorded if is_unpinned and recorded.partition(" ")[0] == _dataset_name(config) else ""

    def _revision(self, config: FinetuneConfig) -> str | None:
        """The revision of the dataset to read: the config's, or the commit that the stage has recorded when it began."""
        return config.revision or self._recorded(config).partition(" ")[2] or None

    @property
    def reads_all_shards(self) -> bool:
        return bool(self.section(FinetuneConfig).teacher_weight)

    def check(self, reader: ShardReader) -> None:
        self.check_early(None, None)

    def check_early(self, width: int | None, teacher_dim: int | None, encoder_config: PretrainedConfig | None = None) -> None:
        config = self.section(FinetuneConfig)
        check_contrast(self, config, width, teacher_dim)
        if config.triplets:
            if not Path(config.triplets).is_file():
                raise ValueError(f"finetune.triplets: no file at {config.triplets}")
            num_rows = sum(1 for _ in islice(read_triplets(config), CHECKED_TRIPLETS))
            if num_rows < min(config.global_batch, CHECKED_TRIPLETS):
                raise ValueError(
                    f"finetune.triplets: {config.triplets} has {num_rows} rows, less than one global batch of"
                    f" {config.global_batch}: lower finetune.global_batch"
                )
        elif config.dataset and Path(config.dataset).is_dir():  # one on the hub takes long to open
            with torch.device("cpu"):  # `datasets` keeps a tensor of its own
                next(read_triplets(config), None)

    def build(self, setup: Setup) -> ContrastTask:
        config = self.section(FinetuneConfig)
        pinned = config.model_copy(update={"revision": self._revision(config)})  # every rank reads the same rows
        rows = load_triplets(pinned, setup.reader, self.directory, setup.seed, setup.check_stop)
        return build_contrast_task(self, config, rows, setup)


def _dataset_name(config: FinetuneConfig) -> str:
    return f"{config.dataset}@{config.subset or 'default'}/{config.split}"


def load_triplets(
    config: FinetuneConfig, reader: ShardReader, directory: Path, seed: int, check_stop: CheckStop = never
) -> Triplets:
    """Triplets from the file or dataset that the config names, else mined from the shards (once, by rank 0)."""
    if config.triplets or config.dataset:
        return Triplets(list(read_triplets(config)), [config.roles])
    path = directory / "triplets.npy"
    mining = mine_triplets(reader, config, seed, path) if rank() == 0 and not is_saved(path) else iter(())
    while any_rank(next(mining, None) is not None):  # so that no rank waits longer than for a block
        check_stop()
    rows = np.load(path, allow_pickle=False)
    columns = [reader.texts(rows[:, column]) for column in range(Triplets.num_views)]
    roles = [reader.roles(rows[:, column]) for column in range(Triplets.num_views)]
    return Triplets(list(zip(*columns, strict=True)), list(zip(*roles, strict=True)))


def read_triplets(config: FinetuneConfig) -> Iterator[tuple[str, ...]]:
    """The rows of the file or dataset that the config names, up to its limit.

    Raises ValueError naming the line, of a .parquet or dataset the row, of one that lacks a text.
    """
    rows: Iterator[tuple[int, tuple[str, ...]]]
    if config.triplets:
        where, rows = f"finetune.triplets: {config.triplets}", read_numbered_rows(config.triplets, config.fields)
    else:
        where = f"finetune.dataset: {config.dataset}"
        rows = (
            (0, row) for row in read_dataset(str(config.dataset), config.fields, config.split, config.subset, config.revision)
        )
    for count, (line, row) in enumerate(islice(rows, config.limit), start=1):
        if not all(map(str.strip, row)):
            empty = next(field for field, text in zip(config.fields, row, strict=True) if not text.strip())
            place = f"line {line}" if line else f"row {count}"
            raise ValueError(f"{where}, {place}: {empty!r} is empty or null; every triplet needs three texts")
        yield row


def mine_triplets(reader: ShardReader, config: FinetuneConfig, seed: int, path: Path) -> Iterator[int]:
    """Writes rows of the shard set, int64 [n, 3] (anchor, positive, hard negative), to `path`; yields n after each block of it.

    Among `mining_pool` random texts, an anchor's positive is its nearest neighbour by teacher cosine, if that lies in
    `positive_range`; its hard negative is the neighbour of rank `negative_rank`. Raises ValueError if fewer than one global
    batch is found.
    """
    pool = first_of_permutation(len(reader), config.mining_pool, seed, 0)
    if len(pool) <= config.negative_rank + 1:
        raise ValueError(f"finetune.negative_rank {config.negative_rank} needs more than {len(pool)} texts to mine from")
    vectors = torch.from_numpy(reader.vectors(pool)).float()
    low, high = config.positive_range
    found: list[np.ndarray] = []
    num_found = 0
    for start in range(0, len(pool), ANCHORS_PER_BLOCK):
        anchors = torch.arange(start, min(start + ANCHORS_PER_BLOCK, len(pool)))
        cosines = vectors[anchors] @ vectors.T
        cosines[torch.arange(len(anchors)), anchors] = -torch.inf
        nearest = cosines.topk(config.negative_rank, dim=1)
        best = nearest.values[:, 0].clamp(-1, 1)  # of float16 vectors, a cosine may be above 1
        good = ((best >= low) & (best <= high)).numpy()
        rows = torch.stack([anchors, nearest.indices[:, 0], nearest.indices[:, -1]], dim=1).numpy()[good]
        found.append(pool[rows])
        num_found += len(rows)
        yield num_found
        if num_found >= config.num_mined:
            break
    triplets = np.concatenate(found)[: config.num_mined]
    if len(triplets) < config.global_batch:
        raise ValueError(
            f"mining found {len(triplets)} triplets with a positive of cosine {low} to {high}, less than one global batch of"
            f" {config.global_batch}: widen finetune.positive_range or lower finetune.global_batch"
        )
    save_array(path, triplets)
    yield len(triplets)
