"""finetune: supervised contrastive fine-tuning on triplets, given or mined from the shards."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from distill.corpus import read_dataset, read_rows
from distill.run.collectives import barrier, rank
from distill.run.config import result
from distill.run.files import fingerprint
from distill.shards import ShardReader
from distill.training.contrast import ContrastConfig, ContrastTask, build_contrast_task
from distill.training.contrast_rows import Triplets
from distill.training.mining import mine_triplets
from distill.training.recorded_array import is_saved
from distill.training.training_stage import Setup, TrainingStage


class FinetuneConfig(ContrastConfig):
    """Supervised contrastive fine-tuning on (anchor, positive, hard negative)."""

    lr: float = result(5e-5, gt=0, description="as in the section ckd")
    init: str = result(
        "ckd", description="the task whose student is fine-tuned; student: the encoder that the section student describes"
    )
    triplets: str | None = result(None, description="a .tsv, .csv, .jsonl or .parquet file; null mines them from the shards")
    fields: tuple[str, str, str] = result(("anchor", "positive", "hard_negative"), description="their columns in it")
    dataset: str | None = result(None, description="instead of a file: the name of a Hugging Face dataset with these columns")
    subset: str | None = result(None, description="dataset: its configuration")
    split: str = result("train", description="dataset: its split")
    limit: int | None = result(None, gt=0, description="read at most this number of triplets")
    num_mined: int = result(20_000, gt=0, description="triplets to mine where there is no file")
    mining_pool: int = result(50_000, gt=0, description="texts among which neighbours are mined")
    positive_range: tuple[float, float] = result((0.6, 0.98), description="teacher cosine of a mined positive")
    negative_rank: int = result(50, gt=1, description="a mined hard negative is the neighbour of this rank")


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
            files = sorted(path for path in Path(config.dataset).rglob("*") if path.is_file())  # none, of a dataset on the hub
            content = fingerprint({str(path): self.digest(path) for path in files}) if files else ""
            found["dataset"] = f"{config.dataset}@{config.subset or 'default'}/{config.split} {content}".strip()
        return found

    def check(self, reader: ShardReader) -> None:
        config = self.section(FinetuneConfig)
        if config.triplets:
            if not Path(config.triplets).is_file():
                raise ValueError(f"finetune.triplets: no file at {config.triplets}")
            next(read_rows(config.triplets, config.fields), None)  # names a field that is not there

    def build(self, setup: Setup) -> ContrastTask:
        config = self.section(FinetuneConfig)
        rows = load_triplets(config, setup.reader, self.directory, setup.seed)
        return build_contrast_task(self, config, rows, setup)


def load_triplets(config: FinetuneConfig, reader: ShardReader, directory: Path, seed: int) -> Triplets:
    """Triplets from the file or dataset that the config names, else mined from the shards (once, by rank 0)."""
    if config.triplets or config.dataset:
        if config.triplets:
            found = read_rows(config.triplets, config.fields)
        else:
            found = read_dataset(str(config.dataset), config.fields, config.split, config.subset)
        return Triplets(list(islice(found, config.limit)))
    path = directory / "triplets.npy"
    if rank() == 0 and not is_saved(path):
        mine_triplets(reader, config, seed, path)
    barrier()
    rows = np.load(path, allow_pickle=False)
    columns = [reader.texts(rows[:, column]) for column in range(Triplets.num_views)]
    return Triplets(list(zip(*columns, strict=True)))
