"""simcse: unsupervised contrastive learning on the texts of the shards, each under two dropout masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import model_validator
from torch import Tensor
from transformers import PretrainedConfig

from distill.run.config import result
from distill.run.prompts import Role
from distill.run.sampling import SampleSource
from distill.shards import ShardReader
from distill.training.contrast import ContrastConfig, ContrastTask, build_contrast_task, check_contrast, own_dropout
from distill.training.samples import Samples
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
    """Each text of a shard set and each translation, twice; those of one row are no negatives of each other."""

    num_views = 2

    def __init__(self, reader: ShardReader, mixture: Sequence[SampleSource] = ()) -> None:
        self.samples = Samples(reader)
        self.shard_rows: np.ndarray = reader.shard_rows
        self.mixture = mixture
        self.source_names: Sequence[str] = self.samples.source_names

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.samples.lengths(rows)

    def views(self, rows: np.ndarray) -> list[list[str]]:
        return [self.samples.texts(rows)] * self.num_views

    def hashes(self, rows: np.ndarray) -> np.ndarray:
        return np.repeat(self.samples.hashes(rows)[:, None], self.num_views, axis=1)

    def roles(self, rows: np.ndarray) -> list[list[Role | None]]:
        return [self.samples.roles(rows)] * self.num_views

    def sources(self, rows: np.ndarray) -> Tensor | None:
        return self.samples.sources(rows)


class SimcseStage(TrainingStage):
    name = "simcse"
    config_class = SimcseConfig
    title = "unsupervised contrastive learning"
    selects_by_sts = True

    def check_early(self, width: int | None, teacher_dim: int | None, encoder_config: PretrainedConfig | None = None) -> None:
        config = self.section(SimcseConfig)
        check_contrast(self, config, width, teacher_dim)
        if config.dropout is None and encoder_config is not None and not own_dropout(encoder_config):
            raise ValueError(
                "simcse.dropout: the encoder's own dropout is 0, so that the two views of a text would be the same: set"
                " simcse.dropout=0.1"
            )

    def build(self, setup: Setup) -> ContrastTask:
        self.check_early(None, None, setup.student.encoder.config)
        return build_contrast_task(self, self.section(SimcseConfig), TextPairs(setup.reader, setup.mixture), setup)
