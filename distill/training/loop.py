"""Step, log, dev evaluation, checkpoint; from the first step or from the last checkpoint.

The loss of a step is the mean over the global batch's rows, however they are dealt: each micro-batch gives the sum over its
rows x W x accumulation steps / G, which the engine divides by W and by the accumulation steps again.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distill.config import TrainConfig
from distill.files import flush
from distill.student import Student
from distill.training.batches import MicroBatch, prefetch
from distill.training.checkpoint import Checkpoints
from distill.training.dashboard import ended_well
from distill.training.dev import Dev, score
from distill.training.distributed import barrier, bytes_received, from_rank_0, rank, reduce_sums, world_size
from distill.training.engine import gradient_norm, learning_rate, set_learning_rate, whole_state
from distill.training.instruments import KEYS, WHOLE_STEP, Instruments
from distill.training.metrics import Metrics
from distill.training.recipe import Recipe
from distill.training.stopping import Stopped


@dataclass
class Progress:
    """What a checkpoint holds beside parameters and optimiser: JSON-able and the same on every rank."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    best_figures: dict[str, float] = field(default_factory=dict)
    evaluations_without_gain: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    evaluated: int = 0
    seconds: float = 0.0


class Trainer:
    """One training stage. After `run`, the best student lies in `student_dir`: as it was trained, or merged with its origin,

        theta = theta_0 + merge (theta_best - theta_0)                  WiSE-FT (arXiv 2109.01903), LM-Cocktail (2311.13534)

    theta_0: with what the stage began. Dev evaluations before the last are of the student in training, and choose the best.
    asked_to_stop: called in each step with its number, from 1; True, on any rank, stops all ranks after this step.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        engine: Any,
        train: TrainConfig,
        dev: Dev | None,
        instruments: Instruments,
        *,
        student_dir: Path,
        checkpoints: Checkpoints,
        tensorboard: Path,
        device: torch.device,
        max_skipped: int,
        asked_to_stop: Callable[[int], bool],
    ) -> None:
        self.name = name
        self.recipe = recipe
        self.engine = engine
        self.train = train
        self.dev = dev
        self.student_dir = student_dir
        self.checkpoints = checkpoints
        self.device = device
        self.max_skipped = max_skipped
        self.asked_to_stop = asked_to_stop
        self.num_steps = self._num_steps()
        self.progress = Progress()
        self._origin = whole_state(engine) if train.merge is not None else {}
        self._mend_student()
        restored = checkpoints.load(engine)
        if restored is not None:
            self.progress = Progress(**restored)
            recipe.restore(self.progress.step)
            if rank() == 0:
                print(f"{name}: continuing after step {self.progress.step} of {self.num_steps}", file=sys.stderr, flush=True)
        self.metrics = Metrics(tensorboard if rank() == 0 else None, first_step=self.progress.step + 1)
        self.instruments = instruments
        self._observed: dict[str, torch.Tensor] = {}

    def _num_steps(self) -> int:
        steps = math.ceil(self.train.epochs * self.recipe.steps_per_epoch)
        return min(steps, self.train.max_steps or steps)

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the stage's results. Raises Stopped, on all ranks, once it is stopped as asked."""
        progress, clock = self.progress, self.instruments.clock
        if progress.step > progress.evaluated and progress.step % self.train.dev_every == 0:
            self._evaluate(owed=True)  # a stop did not wait for it
        started, seconds_before, asked = time.monotonic(), progress.seconds, False
        steps = range(progress.step, progress.step if self._has_stopped_early() else self.num_steps)
        bar = tqdm(
            total=self.num_steps, initial=progress.step, desc=self.name, unit="step", disable=None if rank() == 0 else True
        )
        batches = prefetch(self.recipe.load, steps)
        clock.take()
        for step in steps:
            with clock.of("input wait"):
                micro = next(batches)
            last = step + 1 == self.num_steps
            self.recipe.task.measuring = (step + 1) % self.train.log_every == 0 or last
            self.instruments.count(micro)
            measured = self._step(step, [part.to(self.device) for part in micro])
            asked = measured.pop("asked_to_stop") > 0 and not last
            progress.step = step + 1
            bar.update()
            if self.recipe.task.measuring:
                with clock.of("logging"):
                    self._log(measured)
                bar.set_postfix(loss=f"{measured['loss']:.4f}")
            if (progress.step % self.train.dev_every == 0 or last) and not asked:
                with clock.of("evaluation"):
                    self._evaluate(measured["loss"])
            stop = self._has_stopped_early()
            progress.seconds = seconds_before + time.monotonic() - started
            if last or stop:
                self._log_best()
            if progress.step % self.train.save_every == 0 or last or stop or asked:
                with clock.of("checkpoint"):
                    self.metrics.flush()  # first: what is of a step before a checkpoint is never written again
                    self.checkpoints.save(self.engine, progress.step, asdict(progress))
            if stop or asked:
                break
        batches.close()
        bar.close()
        self.checkpoints.wait()
        self.metrics.close()
        barrier()
        if asked:
            raise Stopped(f"{self.name}: stopped as asked at step {progress.step} of {self.num_steps}")
        return {
            "steps": progress.step,
            "best_step": progress.best_step,
            "best_score": progress.best_score,
            "seconds": round(progress.seconds, 1),
            "sentences": progress.step * self.train.global_batch,
        }

    def _has_stopped_early(self) -> bool:
        return self.train.patience is not None and self.progress.evaluations_without_gain >= self.train.patience

    def _step(self, step: int, micro: list[MicroBatch]) -> dict[str, float]:
        self.checkpoints.check()
        clock, received, task = self.instruments.clock, bytes_received(), self.recipe.task
        with clock.of("gather", on_device=True):
            shared = self.recipe.share(step, micro)
        self.instruments.received(KEYS, received)
        rate = learning_rate(step, self.num_steps, self.train)
        set_learning_rate(self.engine, rate)
        factor = world_size() * len(micro) / self.train.global_batch
        sums: dict[str, torch.Tensor] = {}
        for index, part in enumerate(micro):
            with clock.of("forward and backward", on_device=True):
                loss, measured = self.engine(part, shared)
                self.engine.backward(loss * factor)
            for name, value in {"loss": loss.detach(), **measured}.items():
                sums[name] = sums.get(name, 0.0) + value.double()
            if index < len(micro) - 1:
                self.engine.step()
        with clock.of("optimiser", on_device=True):
            self.engine.step()
        self.recipe.taken()
        sums["asked_to_stop"] = torch.tensor(self.asked_to_stop(step + 1), dtype=torch.double, device=self.device)
        if task.measuring:
            self._observed = task.take_observed()
            sums = {name: rows.double().sum() for name, rows in self._observed.items()} | sums | self.instruments.sums()
        means = {name: value / self.train.global_batch for name, value in reduce_sums(sums).items()}
        self.instruments.received(WHOLE_STEP, received)
        self._count_skipped(step, means["loss"])
        means["learning_rate"] = rate
        norm = gradient_norm(self.engine)
        if norm is not None:
            means["gradient_norm"] = norm
        return means

    def _log(self, means: dict[str, float]) -> None:
        """The figures of the step that was just taken, a measured one. All ranks call it; rank 0 writes."""
        total, step = self.train.global_batch, self.progress.step
        speed = self.instruments.figures(means.pop("tokens") * total, means.pop("squares") * total, total)
        figures = means | self.recipe.floor(means) | self.recipe.state(step - 1) | speed
        if rank() == 0:
            self.metrics.log(step, {name: value for name, value in figures.items() if math.isfinite(value)})
            for name, rows in self._observed.items():
                if name.startswith("similarity/"):  # of rank 0's rows; a tag is a number's or a histogram's
                    cosines = rows[rows.isfinite()].float().cpu().numpy()
                    self.metrics.log_cosines(step, name.replace("similarity/", "cosines/"), cosines)

    def _log_best(self, *, owed: bool = False) -> None:
        """The figures of the student that was kept, by which runs compare. All ranks call it. owed: as in _evaluate."""
        progress = self.progress
        if self.train.merge is not None and self.dev is not None:
            progress.best_figures = self.dev(Student.load(self.student_dir).to(self.device))
            progress.best_score = self._score(progress.best_figures)
            self._show(f"the student of step {progress.best_step}, merged {self.train.merge:g}", progress.best_figures)
        if owed and self.metrics.has("best/score", progress.step):
            return
        figures = progress.best_figures | {"score": progress.best_score, "step": float(progress.best_step)}
        self.metrics.log(progress.step, {f"best/{name}": figure for name, figure in figures.items()})
        self.metrics.add(progress.step, ended_well())

    def _count_skipped(self, step: int, loss: float) -> None:
        """Every rank finds the same. Raises FloatingPointError after `max_skipped` skipped steps in a row."""
        progress = self.progress
        if self.engine.was_step_applied():
            progress.skipped_in_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_row += 1
        self.metrics.log(step + 1, {"skipped": progress.skipped})
        if rank() == 0:
            of = f"{self.name}: step {step + 1}/{self.num_steps} is skipped"
            tqdm.write(f"{of}: the gradient is not finite (loss {loss:.4f})", file=sys.stderr)
        if progress.skipped_in_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self.name}: the gradient is not finite in {progress.skipped_in_row} steps in a row, the last is {step + 1}"
                f" (loss {loss:.4f}): use another name= with a lower {self.name}.lr or engine.precision=fp32,"
                " or raise engine.max_skipped"
            )

    def _evaluate(self, loss: float | None = None, *, owed: bool = False) -> None:
        """Scores the student on all ranks and keeps it if it is the best so far. `loss` is shown beside.

        owed: of a step before the checkpoint, so that a run that was killed since then may have logged it already.
        """
        progress = self.progress
        progress.evaluated = progress.step
        figures = self.dev(self.recipe.student) if self.dev else {}
        value = self._score(figures) if figures else float(progress.step)
        better = from_rank_0(value > progress.best_score, self.device)
        if better:
            progress.best_score, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
            progress.best_figures = figures
            self._keep_student()
        else:
            progress.evaluations_without_gain += 1
        if not (owed and self.metrics.has("dev/score", progress.step)):
            line = self.dev.teacher_line if self.dev else {}
            self.metrics.log(progress.step, {f"dev/{name}": figure for name, figure in figures.items()} | line)
            self.metrics.log(progress.step, {"dev/score": value})
        if owed and self._has_stopped_early():
            self._log_best(owed=True)
        of = f"step {progress.step}/{self.num_steps}{'' if loss is None else f'  loss {loss:.4f}'}"
        self._show(of, figures, "  best" if better else "")

    def _score(self, figures: dict[str, float]) -> float:
        return score(figures, by_sts=self.name in ("finetune", "simcse"))

    def _show(self, of: str, figures: dict[str, float], end: str = "") -> None:
        if rank() == 0:
            shown = "".join(f"  {name.split('/')[1]} {figure:.3f}" for name, figure in figures.items())
            tqdm.write(f"{self.name}: {of}{shown}{end}", file=sys.stderr)

    def _keep_student(self) -> None:
        state = whole_state(self.engine)
        if self.train.merge is not None:
            for name, origin in self._origin.items():
                state[name] = torch.lerp(origin.double(), state[name].double(), self.train.merge).to(origin.dtype)
        if rank() == 0:
            part = self.student_dir.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            prefix = "student."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            extra = {name: value.contiguous() for name, value in state.items() if not name.startswith(prefix)}
            self.recipe.student.save(part, own, extra)
            for path in part.rglob("*"):
                flush(path)
            old = self.student_dir.with_suffix(".old")
            if self.student_dir.exists():
                self.student_dir.rename(old)
            part.rename(self.student_dir)
            shutil.rmtree(old, ignore_errors=True)
        barrier()

    def _mend_student(self) -> None:
        """A kill between the two renames of `_keep_student` leaves the student before under its other name."""
        old = self.student_dir.with_suffix(".old")
        if rank() == 0 and old.exists():
            if self.student_dir.exists():
                shutil.rmtree(old)
            else:
                old.rename(self.student_dir)
        barrier()
