"""Step, log, dev evaluation, checkpoint; from the first step or from the last checkpoint.

The loss of a step is the mean over the global batch's rows, however they are assigned to ranks: each micro-batch gives the sum
over its rows x W x accumulation steps / G, which the engine divides by W and by the accumulation steps again (those that it was
built with: the number of a step's micro-batches may be another).
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.run.collectives import any_rank, barrier, bytes_received, from_rank_0, rank, reduce_sums, world_size
from distill.run.stage import StopRequested
from distill.run.stopping import Stopped
from distill.student import Student
from distill.training.batches import MicroBatch, prefetch
from distill.training.checkpoint import Checkpoints
from distill.training.dashboard import session_end
from distill.training.dev_evaluation import DevEvaluation
from distill.training.engine import gradient_norm, has_finite_weights, learning_rate, set_learning_rate
from distill.training.step_metrics import KEYS, WHOLE_STEP, StepMetrics, source_metrics
from distill.training.student_store import StudentStore
from distill.training.task import StepContext, Task
from distill.training.tensorboard import TensorBoard
from distill.training.train_config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a checkpoint holds besides parameters and optimizer: JSON-able and the same on every rank."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    initial_score: float | None = None
    evaluations_without_gain: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    evaluated: int = 0
    seconds: float = 0.0


@dataclass
class Trainer:
    """One training stage, from its last checkpoint; after `run`, the best student lies in `student_dir`.

    Dev evaluations are of the student in training, from step 0 on, and choose the best; with `merge`, the last one is of the
    merged student.
    stop_requested: called in each step with its number, from 1; True, on any rank, stops all ranks after this step.
    """

    name: str
    task: Task
    engine: Any
    train: TrainConfig
    dev: DevEvaluation | None
    metrics: StepMetrics
    checkpoints: Checkpoints
    student_dir: Path
    tensorboard_dir: Path
    device: torch.device
    max_skipped: int
    stop_requested: StopRequested
    selects_by_sts: bool
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        steps = math.ceil(self.train.epochs * self.task.steps_per_epoch)
        self.num_steps = min(steps, self.train.max_steps or steps)
        self.store = StudentStore(self.student_dir, self.engine, merge=self.train.merge)
        restored = self.checkpoints.load(self.engine, self.student_dir)
        if restored is not None:
            self.progress = Progress(**restored)
            self.task.restore(self.progress.step)
            if rank() == 0:
                logger.info("%s: continuing after step %d of %d", self.name, self.progress.step, self.num_steps)
        self.tensorboard = TensorBoard(self.tensorboard_dir if rank() == 0 else None, first_step=self.progress.step + 1)

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the stage's results. Raises Stopped, on all ranks, once a stop was requested."""
        progress, clock = self.progress, self.metrics.clock
        if progress.step == 0 and self.dev is not None:
            self._evaluate()  # the stage returns no student worse than it began with
            progress.initial_score = progress.best_score
        if progress.step > progress.evaluated and progress.step % self.train.dev_every == 0:
            self._evaluate(deferred=True)  # a stop did not wait for it
        started, seconds_before, stop_requested = time.monotonic(), progress.seconds, False
        steps = range(progress.step, progress.step if self._has_stopped_early() else self.num_steps)
        bar = tqdm(
            total=self.num_steps, initial=progress.step, desc=self.name, unit="step", disable=None if rank() == 0 else True
        )
        batches = prefetch(self.task.load, steps)
        clock.take()
        for step in steps:
            with clock.of("input wait"):
                micro = next(batches)
            last = step + 1 == self.num_steps
            is_logged = (step + 1) % self.train.log_every == 0 or last
            self.metrics.count(micro)
            context, means = self._step(step, [part.to(self.device) for part in micro], is_logged)
            stop_requested = means.pop("stop_requested") > 0 and not last
            progress.step = step + 1
            bar.update()
            if is_logged:
                with clock.of("logging"):
                    self._log(context, means)
                bar.set_postfix(loss=f"{means['loss']:.4f}")
            if (progress.step % self.train.dev_every == 0 or last) and not stop_requested:
                with clock.of("evaluation"):
                    self._evaluate(means["loss"])
            stops_early = self._has_stopped_early()
            progress.seconds = seconds_before + time.monotonic() - started
            if last or stops_early:
                self._log_best()
            if progress.step % self.train.save_every == 0 or last or stops_early or stop_requested:
                with clock.of("checkpoint"):
                    self.tensorboard.flush()  # first: points of steps before a checkpoint are never written again
                    self.checkpoints.save(self.engine, progress.step, asdict(progress), self.student_dir)
            if stops_early or stop_requested:
                break
        batches.close()
        bar.close()
        self.checkpoints.wait()
        self.tensorboard.close()
        barrier()
        if stop_requested:
            raise Stopped(f"{self.name}: stopped on request at step {progress.step} of {self.num_steps}")
        return {
            "steps": progress.step,
            "best_step": progress.best_step,
            "best_score": progress.best_score,
            "initial_score": progress.initial_score,
            "seconds": round(progress.seconds, 1),
            "texts": progress.step * self.train.global_batch,
        }

    def _has_stopped_early(self) -> bool:
        return self.train.patience is not None and self.progress.evaluations_without_gain >= self.train.patience

    def _step(self, step: int, micro: list[MicroBatch], is_logged: bool) -> tuple[StepContext, dict[str, float]]:
        """Takes one step; returns its context and the means over the global batch, the same on every rank."""
        self.checkpoints.check()
        clock, received = self.metrics.clock, bytes_received()
        with clock.of("gather", on_device=True):
            context = self.task.prepare_step(step, micro, is_logged=is_logged)
        self.metrics.received(KEYS, received)
        rate = learning_rate(step, self.num_steps, self.train)
        set_learning_rate(self.engine, rate)
        sums = self._forward_and_backward(micro, context)
        with clock.of("optimizer", on_device=True):
            self.engine.step()
        self.task.after_step(context)
        sums["stop_requested"] = torch.tensor(self.stop_requested(step + 1), dtype=torch.double, device=self.device)
        if is_logged:
            observed = {name: rows.double().sum() for name, rows in context.observations().items()}
            sums = observed | sums | self.metrics.sums()
        means = {name: value / self.train.global_batch for name, value in reduce_sums(sums).items()}
        self.metrics.received(WHOLE_STEP, received)
        self._count_skipped(step, means["loss"])
        means["learning_rate"] = rate
        norm = gradient_norm(self.engine)
        if norm is not None:
            means["gradient_norm"] = norm
        return context, means

    def _forward_and_backward(self, micro: list[MicroBatch], context: StepContext) -> dict[str, Tensor]:
        """Accumulates the gradients of all micro-batches; returns this rank's sums over rows, float64."""
        factor = world_size() * self.engine.gradient_accumulation_steps() / self.train.global_batch
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(micro):
            self.engine.set_gradient_accumulation_boundary(index == len(micro) - 1)  # steps may differ in their number
            with self.metrics.clock.of("forward and backward", on_device=True):
                loss, logged = self.engine(part, context)
                self.engine.backward(loss * factor)
            for name, value in {"loss": loss.detach(), **logged}.items():
                sums[name] = sums.get(name, 0.0) + value.double()
            if index < len(micro) - 1:
                self.engine.step()
        return sums

    def _log(self, context: StepContext, means: dict[str, float]) -> None:
        """Writes the metrics of the step that was just taken, a logged one. All ranks call it; rank 0 writes."""
        total, step = self.train.global_batch, self.progress.step
        speed = self.metrics.since_last_call(means.pop("tokens") * total, means.pop("squares") * total, total)
        means |= source_metrics(means, total)
        values = means | self.task.reference_losses(means) | self.task.step_metrics(step - 1) | speed
        if rank() == 0:
            self.tensorboard.log(step, {name: value for name, value in values.items() if math.isfinite(value)})
            for name, rows in context.observations().items():
                if name.startswith("similarity/"):  # of rank 0's rows; a tag is a number's or a histogram's
                    cosines = rows[rows.isfinite()].float().cpu().numpy()
                    self.tensorboard.log_cosines(step, name.replace("similarity/", "cosines/"), cosines)

    def _log_best(self, *, deferred: bool = False) -> None:
        """Writes the metrics of the student that was kept. All ranks call it. deferred: see _evaluate."""
        progress = self.progress
        if self.train.merge is not None and self.dev is not None:
            progress.best_metrics = self.dev(Student.load(self.student_dir).to(self.device))
            progress.best_score = self._score(progress.best_metrics)
            self._show(f"the student of step {progress.best_step}, merged {self.train.merge:g}", progress.best_metrics)
        if rank() == 0 and progress.initial_score is not None:
            gain = progress.best_score - progress.initial_score
            logger.info("%s: step %d is kept, score %+.4f over step 0", self.name, progress.best_step, gain)
        if deferred and self.tensorboard.has("best/score", progress.step):
            return
        values = progress.best_metrics | {"score": progress.best_score, "step": float(progress.best_step)}
        self.tensorboard.log(progress.step, {f"best/{name}": value for name, value in values.items()})
        self.tensorboard.add(progress.step, session_end())

    def _count_skipped(self, step: int, loss: float) -> None:
        """Every rank finds the same. Raises FloatingPointError after `max_skipped` skipped steps in a row, or if all were."""
        progress = self.progress
        if self.engine.was_step_applied():
            progress.skipped_in_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_row += 1
        self.tensorboard.log(step + 1, {"skipped": progress.skipped})
        if rank() == 0:
            where = f"{self.name}: step {step + 1}/{self.num_steps}"
            logger.warning("%s is skipped: the gradient is not finite (loss %.4f)", where, loss)
        if progress.skipped_in_row >= min(self.max_skipped, self.num_steps):
            more = ", or raise engine.max_skipped" if self.max_skipped < self.num_steps else ""
            raise FloatingPointError(
                f"{self.name}: the gradient is not finite in {progress.skipped_in_row} steps in a row, the last is {step + 1}"
                f" (loss {loss:.4f}): {self._remedy}{more}"
            )

    @property
    def _remedy(self) -> str:
        return f"use another name= with a lower {self.name}.lr or engine.precision=fp32"

    def _evaluate(self, loss: float | None = None, *, deferred: bool = False) -> None:
        """Scores the student on all ranks and keeps it if it is the best so far. `loss` is shown beside.

        deferred: of a step before the checkpoint, so that a run that was killed since then may have logged it already.
        """
        progress = self.progress
        progress.evaluated = progress.step
        if any_rank(not has_finite_weights(self.engine)):
            raise FloatingPointError(f"{self.name}: after step {progress.step} the weights are not finite: {self._remedy}")
        metrics = self.dev(self.task.module.student) if self.dev else {}
        value = self._score(metrics) if metrics else float(progress.step)
        better = from_rank_0(value > progress.best_score, self.device)
        if better:
            progress.best_score, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
            progress.best_metrics = metrics
            self.store.keep(self.task.module.student)
        else:
            progress.evaluations_without_gain += 1
        if not (deferred and self.tensorboard.has("dev/score", progress.step)):
            teacher = self.dev.teacher_scores if self.dev else {}
            self.tensorboard.log(progress.step, {f"dev/{name}": each for name, each in metrics.items()} | teacher)
            self.tensorboard.log(progress.step, {"dev/score": value})
        if deferred and self._has_stopped_early():
            self._log_best(deferred=True)
        what = f"step {progress.step}/{self.num_steps}{'' if loss is None else f'  loss {loss:.4f}'}"
        self._show(what, metrics, "  best" if better else "")

    def _score(self, metrics: dict[str, float]) -> float:
        """What decides which student is best: the mean fidelity; STS-B dev where the task selects by it and it is known."""
        if self.selects_by_sts and "sts/STSB-dev" in metrics:
            return metrics["sts/STSB-dev"] / 100
        return float(np.mean([value for name, value in metrics.items() if name.startswith("fidelity/")]))

    def _show(self, what: str, metrics: dict[str, float], end: str = "") -> None:
        if rank() == 0:
            shown = ""
            for name, value in metrics.items():
                group, _, metric = name.rpartition("/")
                if not group.startswith("fidelity_"):
                    shown += f"  {metric} {value:.3f}"
                elif metric == "spearman":  # of a role or of the translations of a column
                    shown += f"  {group.removeprefix('fidelity_')} {value:.3f}"
            logger.info("%s: %s%s%s", self.name, what, shown, end)
