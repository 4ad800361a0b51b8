"""What a stage has written for TensorBoard, read by TensorBoard's own reader."""

from __future__ import annotations

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events_of(run: Path, stage: str) -> EventAccumulator:
    """All that TensorBoard finds of a stage."""
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(run / "tensorboard" / stage), size_guidance=everything).Reload()


def points_of(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    """The points of all tags but measurements of time and memory."""
    measured = "time/|memory/|mfu|.*_per_second|bytes_received/"
    tags = [tag for tag in sorted(events.Tags()["scalars"]) if not re.match(measured, tag)]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
