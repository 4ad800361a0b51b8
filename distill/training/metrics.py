"""TensorBoard, every step once: on a resume, points after the checkpoint's step are purged before they are written again."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """The one front door for what is plotted. On other ranks than 0, `directory` is None and nothing is written."""

    def __init__(self, directory: Path | None, first_step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=first_step) if directory else None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
