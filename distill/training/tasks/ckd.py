"""ckd: contrastive knowledge distillation. The student's vectors, projected to the teacher's width, against the teacher's."""

from __future__ import annotations

from transformers import PretrainedConfig

from distill.run.config import result
from distill.shards import ShardReader
from distill.training.projection import Kind, build_projection, fit_projection
from distill.training.teacher_keys import KeysConfig, TeacherKeysModule, TeacherKeysTask
from distill.training.training_stage import Setup, TrainingStage


class CkdConfig(KeysConfig):
    """Contrastive knowledge distillation (DistilCSE), as a weighted sum with a term that keeps the geometry."""

    task = "ckd"
    weights: dict[str, float] = result(
        {"ckd": 1.0, "cosine": 10.0}, description="the loss is this weighted sum; {ckd: 1} is the paper's"
    )
    projection: Kind = result(
        "auto",
        description="to the teacher's width. auto: none where they agree, else linear; pca, procrustes: fitted to the shards,"
        " then fixed",
    )
    projection_width: int | None = result(
        None, gt=0, description="the stage is refused if the teacher's vectors have another width; null: not checked"
    )


class CkdStage(TrainingStage):
    name = "ckd"
    config_class = CkdConfig
    title = "contrastive knowledge distillation"

    @property
    def init(self) -> str:
        return "student"

    def check(self, reader: ShardReader) -> None:
        self.check_early(None, reader.dim)

    def check_early(self, width: int | None, teacher_dim: int | None, encoder_config: PretrainedConfig | None = None) -> None:
        config = self.section(CkdConfig)
        if teacher_dim is not None and config.projection_width not in (None, teacher_dim):
            expected = config.projection_width
            raise ValueError(f"ckd.projection_width {expected} is not the teacher's width {teacher_dim}: leave it out")
        if width is not None and teacher_dim is not None:
            build_projection(width, teacher_dim, config.projection)

    def build(self, setup: Setup) -> TeacherKeysTask:
        config, student = self.section(CkdConfig), setup.student
        projection = build_projection(student.width, setup.reader.dim, config.projection)
        if projection is not None:
            fit_projection(projection, student, setup.reader, config.projection, setup.seed, setup.check_stop)
        student.is_aligned = projection is None
        module = TeacherKeysModule(student, projection, config, setup.amp, seed=setup.seed)
        return TeacherKeysTask(module, setup.shard_batches(config, tokens_per_batch=config.tokens_per_batch), setup.device)
