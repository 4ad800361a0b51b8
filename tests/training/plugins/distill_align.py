"""A training task in an installed package: the student's vectors, of the teacher's width, are turned towards the teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from distill.objectives.loss_terms.cosine import cosine_losses
from distill.run.config import result
from distill.training.batches import MicroBatch, ShardBatches
from distill.training.task import StepContext, Task, TrainingModule
from distill.training.train_config import TrainConfig
from distill.training.training_stage import Setup, TrainingStage


class AlignConfig(TrainConfig):
    """Alignment: the mean over texts of (1 - cosine to the teacher's vector) ^ power."""

    power: float = result(1.0, gt=0, description="above 1, distant texts count more")


class AlignModule(TrainingModule):
    def __init__(self, setup: Setup, power: float) -> None:
        super().__init__()
        self.student = setup.student
        self.amp = setup.amp
        self.power = power

    def forward(self, micro: MicroBatch, context: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        vectors_bd = normalize(self.embed(micro)[: len(micro.positions)], dim=-1)
        losses_b = cosine_losses(vectors_bd, micro.teacher) ** self.power
        return losses_b.sum(), {"loss/align": losses_b.detach().sum()}


class AlignTask(Task):
    def __init__(self, module: AlignModule, batches: ShardBatches) -> None:
        self.module = module
        self.batches = batches
        self.num_micro = batches.num_micro
        self.steps_per_epoch = batches.order.steps_per_epoch

    def load(self, step: int) -> list[MicroBatch]:
        return self.batches(step)

    def reference_losses(self, means: dict[str, float]) -> dict[str, float]:
        return {"reference_loss": 0.0}


class AlignStage(TrainingStage):
    name = "align"
    config_class = AlignConfig
    title = "alignment"

    @property
    def init(self) -> str:
        return "student"

    def build(self, setup: Setup) -> AlignTask:
        config = self.section(AlignConfig)
        if setup.student.width != setup.reader.dim:
            raise ValueError(f"align: the student is {setup.student.width} wide, the teacher {setup.reader.dim}")
        return AlignTask(AlignModule(setup, config.power), setup.shard_batches(config))
