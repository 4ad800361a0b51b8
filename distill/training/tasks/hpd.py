"""hpd: a compact head on the student, trained towards the PCA of the teacher's vectors.

The same losses and queue as in ckd, in a smaller space: ckd projects the student's vectors up to the teacher's width, hpd
projects the teacher's vectors down to `dim` by PCA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn
from transformers import PretrainedConfig

from distill.objectives.loss_terms.relational import Relational, whitening_map
from distill.run.config import result
from distill.run.session_log import session
from distill.run.stopping import CheckStop, never
from distill.shards import ShardReader
from distill.student import Student
from distill.student.student import load_projection
from distill.training.encoded_cache import encode_all
from distill.training.projection import LinearMap, Sample, encode_sample, fit_sample, ridge_regression, set_linear
from distill.training.teacher_keys import KeysConfig, TeacherKeysModule, TeacherKeysTask
from distill.training.training_stage import Setup, TrainingStage


class HpdConfig(KeysConfig):
    """Homomorphic projective distillation: the student's vectors become the PCA of the teacher's.

    The head is initialised with the teacher's principal components C composed with ckd's trained projection, with C itself if
    ckd needed no projection, and otherwise with a ridge regression of the targets on the student's vectors.
    """

    task = "hpd"
    weights: dict[str, float] = result(
        {"pca": 1.0},
        description="the loss is this weighted sum. pca: the paper's squared error; cosine: 1 - cosine to the teacher's compact"
        " vector, at every nested size; relational: at every nested size, the similarities between a batch's texts match those"
        " of the teacher's full vectors, with congen's temperatures; ckd, congen: as in the section ckd, against the teacher's"
        " compact vectors",
    )
    init: str = result(
        "finetune", description="the task whose student is compressed; student: the encoder that the section student describes"
    )
    dim: int = result(128, gt=0, description="dimensions of the compact vectors")
    nested: list[int] = result(
        [64, 32], description="sizes below `dim` that cosine and relational train, and that are evaluated and exported"
    )
    head: Literal["tanh", "linear"] = result("tanh", description="linear + tanh is the paper's; linear has no activation")
    freeze_encoder: bool = result(False, description="train the head alone")
    whitening: float = result(
        0.0,
        ge=0,
        le=1,
        description="relational: the teacher's principal directions are divided by their standard deviation to this power"
        " before similarities are computed; 0.25 is better for search, and no worse for STS",
    )

    @model_validator(mode="after")
    def _nested_sizes_fit(self) -> HpdConfig:
        if any(not 0 < size < self.dim for size in self.nested):
            raise ValueError(f"hpd.nested {self.nested} must lie between 0 and hpd.dim {self.dim}")
        return self

    @model_validator(mode="after")
    def _whitening_has_relations(self) -> HpdConfig:
        if self.whitening and not self.weights.get("relational"):
            raise ValueError(
                "hpd.whitening changes the relational term alone: add `relational` to hpd.weights, or leave it out"
            )
        return self


class HpdModule(TeacherKeysModule):
    """Trains the student's head to match C t, the PCA projection of the teacher's vector t. components: C [dim, d_t].

    whitening: a map [d_t, d_t] of the teacher's vectors before the relational term (whitening_map), or None.
    """

    def __init__(
        self,
        student: Student,
        components: Tensor,
        config: HpdConfig,
        amp: torch.dtype | None,
        *,
        whitening: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student, None, config, amp, seed=seed)
        self.components = components
        self.nested: Sequence[int] = [config.dim, *config.nested]
        self.key_width = len(components)
        relational = self.batch_terms.get("relational")
        if isinstance(relational, Relational):
            relational.whitening = whitening
        if config.freeze_encoder:
            student.encoder.requires_grad_(False)
            student.dense.requires_grad_(False)

    def targets(self, teacher: Tensor) -> Tensor:
        return teacher.float() @ self.components.T.to(teacher.device)

    def as_keys(self, teacher: Tensor) -> Tensor:
        return nn.functional.normalize(self.targets(teacher), dim=-1).to(torch.float16)


class HpdStage(TrainingStage):
    name = "hpd"
    config_class = HpdConfig
    title = "homomorphic projective distillation"

    def check_early(self, width: int | None, teacher_dim: int | None, encoder_config: PretrainedConfig | None = None) -> None:
        dim = self.section(HpdConfig).dim
        if teacher_dim is not None and dim > teacher_dim:
            raise ValueError(f"hpd.dim {dim} is above the width of the teacher's vectors, {teacher_dim}; lower it")

    def check(self, reader: ShardReader) -> None:
        if self.section(HpdConfig).freeze_encoder and reader.num_columns > 1:
            raise ValueError(
                "hpd.freeze_encoder keeps one vector per text of the shards, and they have translations: set"
                " hpd.freeze_encoder=false"
            )

    def build(self, setup: Setup) -> TeacherKeysTask:
        config, student, reader = self.section(HpdConfig), setup.student, setup.reader
        if config.dim > min(reader.dim, len(reader) - 1):
            raise ValueError(f"hpd.dim {config.dim} is above what the teacher's {len(reader)} x {reader.dim} vectors have")
        encoded = None
        if config.freeze_encoder:
            with session(self.directory, "encode", setup.device):
                encoded = encode_all(student, reader, self.cache_dir, setup.amp, setup.check_stop)
        student.add_head(config.dim, config.head, setup.seed)
        components = torch.from_numpy(reader.moments.pca(config.dim)[0]).float()
        sample = fit_sample(reader, setup.seed)
        known = self._learned_map(student, components.double().numpy())
        fit_head(student, sample, sample.vectors @ components.numpy().T, known=known, check_stop=setup.check_stop)
        whitening = fit_whitening(config, reader)
        module = HpdModule(student, components, config, setup.amp, whitening=whitening, seed=setup.seed)
        batches = setup.shard_batches(config, encoded, tokens_per_batch=config.tokens_per_batch)
        return TeacherKeysTask(module, batches, setup.device)

    def results(self) -> dict[str, Any]:
        return {"nested_sizes": self.section(HpdConfig).nested}

    def _learned_map(self, student: Student, components: np.ndarray) -> LinearMap | None:
        """The initial head as (weight [dim, d_s], bias [dim]): the components [dim, d_t] composed with ckd's projection, or the
        components alone if the student is aligned without one. None if there is no such map, or a later stage dropped it."""
        projection = None if self.init == "student" else load_projection(self.context.run_dir / self.init / "student")
        if projection is not None:
            weight, bias = (parameter.detach().double().numpy() for parameter in (projection.weight, projection.bias))
            return components @ weight, components @ bias
        return (components, np.zeros(len(components))) if student.is_aligned else None


def fit_head(
    student: Student,
    sample: Sample,
    targets: np.ndarray,
    *,
    known: LinearMap | None = None,
    check_stop: CheckStop = never,
) -> None:
    """Sets the head near `targets` [n, dim] of the sample's texts, which training then refines.

    known: (weight [dim, d_s], bias [dim]), a map from the student's vectors to the directions of the targets that an earlier
    stage learned; it is scaled to fit best. None: the ridge regression on the student's vectors.
    """
    head = student.head
    assert head is not None
    student.head = None
    vectors = encode_sample(student, sample, check_stop, normalize=False)
    student.head = head
    wanted = np.arctanh(targets.clip(-0.999, 0.999)) if len(head) > 1 else targets
    if known is None:
        weight, bias = ridge_regression(vectors, wanted)
    else:
        reached = vectors @ known[0].T + known[1]
        factor = np.vdot(reached, wanted) / np.vdot(reached, reached)
        weight, bias = factor * known[0], factor * known[1]
    linear = head[0]
    assert isinstance(linear, nn.Linear)
    set_linear(linear, weight, bias)


def fit_whitening(config: HpdConfig, reader: ShardReader) -> Tensor | None:
    """float32 [d_t, d_t], from the moments of all teacher vectors; None where the relational term takes them as they are."""
    if not config.whitening:
        return None
    components, eigenvalues = map(torch.from_numpy, reader.moments.pca(reader.dim))
    return whitening_map(components, eigenvalues, config.whitening).float()
