"""Summaries for TensorBoard's plugins: the layout of the custom-scalars page, and the hparams table."""

from __future__ import annotations

import time
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.custom_scalar.metadata import create_summary_metadata as layout_metadata
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb

CHARTS: dict[str, dict[str, list[str]]] = {
    "Loss and reference loss": {
        "loss and reference loss": ["loss", "reference_loss"],
        "terms of the loss and their references": ["loss/.*", "reference_loss/.*"],
    },
    "Dev evaluation, with the teacher's scores": {
        "fidelity on held-out text (the teacher's is 1)": ["dev/fidelity/.*", "teacher/fidelity"],
        "STS-B dev, student and teacher": ["dev/sts/.*", "teacher/sts/.*"],
        "score that chooses the student to keep": ["dev/score"],
    },
    "Similarity of positives and hardest negatives": {
        "mean cosine": ["similarity/.*"],
        "fraction of masked negatives": ["negatives/masked"],
    },
    "Throughput and where the time goes": {
        "fraction of the time": ["time/.*"],
        "texts per second": ["texts_per_second"],
        "tokens per second": ["tokens_per_second"],
        "MFU: of a large matrix product on this device": ["mfu"],
    },
    "Temperature and gradient norm": {
        "temperature (logits are this x cosine)": ["temperature"],
        "gradient norm, before clipping": ["gradient_norm"],
        "learning rate": ["learning_rate"],
    },
    "Queue, memory, communication": {
        "age of the queue's keys, steps": ["queue/age_.*"],
        "memory of rank 0, GiB": ["memory/.*"],
        "bytes received per rank and step, without gradients and parameters": ["bytes_received/.*"],
    },
}
CLOSED = {"Queue, memory, communication"}


def layout() -> Summary:
    """The layout of the custom-scalars page: CHARTS, each of the tags that match wholly, in all runs."""
    categories = [
        Category(
            title=title,
            closed=title in CLOSED,
            chart=[
                Chart(title=name, multiline=MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
                for name, tags in charts.items()
            ],
        )
        for title, charts in CHARTS.items()
    ]
    encoded = Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype=DT_STRING, string_val=[encoded])
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, metadata=layout_metadata(), tensor=tensor)])


def settings_row(tree: dict[str, Any], run: str) -> Summary:
    """A row of the hparams table: a JSON tree's leaves as `ckd.lr`-like columns, those that are null left out.

    The usual add_hparams would write a run of another name beside this one.
    """
    return hparams_pb(dict(_leaves(tree)), trial_id=run, start_time_secs=time.time())


def session_end() -> Summary:
    """The end of a stage in the hparams table."""
    data = HParamsPluginData(session_end_info=SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time()))
    metadata: SummaryMetadata = hparams_metadata.create_summary_metadata(data)
    tag = hparams_metadata.SESSION_END_INFO_TAG
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)])


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            leaves.append((prefix + name, value if isinstance(value, bool | int | float | str) else str(value)))
    return leaves
