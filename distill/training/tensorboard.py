"""TensorBoard, every step once: on a resume, points after the checkpoint's step are purged before they are written again.

A stage that begins at its first step begins a new event folder. What describes the stage is written then, at step 0; all else
at its step, and is on disk before that step's checkpoint is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from distill.run.files import naming

BIN_WIDTH = 0.02  # of a histogram of cosines


class TensorBoard:
    """The event file of one stage. On other ranks than 0, `directory` is None and nothing is written."""

    def __init__(self, directory: Path | None, first_step: int) -> None:
        self.is_new = directory is not None and first_step == 1
        self._directory = directory
        self._writer: SummaryWriter | None = None
        if directory is not None:
            if self.is_new:
                shutil.rmtree(directory, ignore_errors=True)
            self._writer = SummaryWriter(str(directory), purge_step=None if self.is_new else first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None and self._directory is not None:
            with naming(self._directory):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def has(self, name: str, step: int) -> bool:
        """Whether a point was written, by this process or one before it. Reads all events; True on ranks that write none."""
        if self._directory is None:
            return True
        self.flush()
        events = EventAccumulator(str(self._directory), size_guidance={"scalars": 0}).Reload()
        return name in events.Tags()["scalars"] and any(point.step == step for point in events.Scalars(name))

    def log_cosines(self, step: int, name: str, cosines: np.ndarray) -> None:
        """A histogram of cosines [n] that are finite; its bins are the same at every step."""
        if self._writer is None or not len(cosines):
            return
        numbers = np.floor(cosines.clip(-1, 1).astype(np.float64) / BIN_WIDTH).astype(int)
        first = int(numbers.min())
        counts = np.bincount(numbers - first)
        self._writer.add_histogram_raw(
            name,
            min=float(cosines.min()),
            max=float(cosines.max()),
            num=len(cosines),
            sum=float(cosines.sum()),
            sum_squares=float(np.square(cosines).sum()),
            bucket_limits=[(first + index) * BIN_WIDTH for index in range(len(counts) + 1)],
            bucket_counts=[0, *counts.tolist()],  # the first limit is where the first bin begins
            global_step=step,
        )

    def describe(self, texts: dict[str, str], summaries: list[Summary]) -> None:
        """Writes what describes the stage: Markdown by name, and summaries for TensorBoard's plugins."""
        if self._writer is not None:
            for summary in summaries:
                self.add(0, summary)
            for name, text in texts.items():
                self._writer.add_text(name, text, 0)
            self.flush()

    def add(self, step: int, summary: Summary) -> None:
        if self._writer is not None:
            writer: Any = self._writer.file_writer
            writer.add_summary(summary, step)

    def flush(self) -> None:
        if self._writer is not None and self._directory is not None:
            with naming(self._directory):
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None and self._directory is not None:
            with naming(self._directory):
                self._writer.close()
