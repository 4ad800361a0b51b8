"""simcse: unsupervised contrastive learning on the texts of the shards, each under two dropout masks."""

from __future__ import annotations

import numpy as np
from pydantic import model_validator

from distill.run.config import result
from distill.shards import ShardReader
from distill.training.contrast import ContrastConfig, ContrastTask, build_contrast_task
from distill.training.training_stage import Setup, TrainingStage


class SimcseConfig(ContrastConfig):
    """Unsupervised SimCSE on the text of the shards: a text under two dropout masks is a positive pair."""

    lr: float = result(1e-5, gt=0, description="as in the section ckd")
    global_batch: int = result(128, gt=1, description="texts per step, over all ranks, each under two masks")
    init: str = result(
        "student",
        description="the task whose student is trained on; student: the encoder that the section student describes",
    )

    @model_validator(mode="after")
    def _views_differ(self) -> SimcseConfig:
        if self.dropout == 0:
            raise ValueError("simcse.dropout is 0: the two views of a sentence would be the same")
        return self


class TextPairs:
    """Each text of a shard set, twice."""

    num_views = 2

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader

    @property
    def shard_rows(self) -> np.ndarray:
        return self.reader.shard_rows

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.reader.lengths(rows)

    def views(self, rows: np.ndarray) -> list[list[str]]:
        return [self.reader.texts(rows)] * self.num_views


class SimcseStage(TrainingStage):
    name = "simcse"
    config_class = SimcseConfig
    title = "unsupervised contrastive learning"
    selects_by_sts = True

    def build(self, setup: Setup) -> ContrastTask:
        task = build_contrast_task(self, self.section(SimcseConfig), TextPairs(setup.reader), setup)
        if not task.dropout:
            raise ValueError(
                "simcse.dropout: the encoder's own dropout is 0, so that the two views of a text would be the same: set"
                " simcse.dropout=0.1"
            )
        return task
