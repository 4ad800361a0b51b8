"""What describes a stage in TensorBoard: the layout of its charts, its row of the hparams table, and texts."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
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

from distill.corpus.text_config import TextConfig
from distill.run.collectives import world_size
from distill.run.files import read_json
from distill.run.session_log import device_name, versions
from distill.run.stage import RunContext

Charts = dict[str, list[str]]
"""The tags of each chart, as regular expressions, by its title."""
LOSSES, DEV = "Loss and reference loss", "Dev evaluation, with the teacher's scores"
STS = {"STS-B dev, student and teacher": ["dev/sts/.*", "teacher/sts/.*"]}
PARTS = {"fidelity among queries and documents, and of translations": ["dev/fidelity_.*"]}
SOURCES = {"mean loss of each source's texts": ["source_loss/.*"], "texts of each source in a step": ["source_texts/.*"]}
CHARTS: dict[str, Charts] = {
    LOSSES: {"weighted sum, of all stages on one axis": ["loss", "reference_loss"]},
    DEV: {
        "fidelity on held-out text (the teacher's is 1)": ["dev/fidelity/.*", "teacher/fidelity"],
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


def describe_run(
    context: RunContext, stage: str, settings: dict[str, Any], device: torch.device
) -> tuple[dict[str, str], list[Summary]]:
    """Markdown by name, and summaries. Of a sweep, the hparams columns that differ are the fields that were swept."""
    teacher = context.value("teacher.model")
    row = {"stage": stage, "ranks": world_size(), "teacher": teacher, **inherited_settings(context, settings)}
    sources = context.section(TextConfig).sources
    has_sources = len(sources) > 1 or sources[0].columns is not None
    has_parts = len({source.role for source in sources}) > 1 or any(source.columns for source in sources)
    dev = (STS if context.value("evaluate.sts") is not None else {}) | (PARTS if has_parts else {})
    charts = charts_of(settings.get(stage, {}), SOURCES if has_sources else {}, dev)
    return description(context.run_dir, device), [layout(charts), settings_row(row, f"{context.name}/{stage}")]


def charts_of(section: dict[str, Any], losses: Charts, dev: Charts) -> dict[str, Charts]:
    """The charts of a stage, by their group: CHARTS, one for each term of the loss, as they differ in size, and more."""
    terms = [name for name, weight in section.get("weights", {}).items() if weight]
    if "teacher_weight" in section:
        terms = ["contrast", *(["teacher"] if section["teacher_weight"] else [])]
    of_terms = {f"{term} and its reference": [f"loss/{term}", f"reference_loss/{term}"] for term in terms or [".*"]}
    return CHARTS | {LOSSES: of_terms | CHARTS[LOSSES] | losses, DEV: CHARTS[DEV] | dev}


def inherited_settings(context: RunContext, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage and of those whose students it was trained from."""
    merged = dict(settings)
    for name in reversed(context.trained_stages):
        begun = read_json(context.run_dir / name / "DONE.json")
        if begun is not None and any(section.get("init") == name for section in merged.values() if isinstance(section, dict)):
            merged = begun["settings"] | merged
    return merged


def description(run_dir: Path, device: torch.device) -> dict[str, str]:
    """The resolved config, the versions and the command, as Markdown by name."""
    made_with = versions() | {"ranks": str(world_size()), "device": device_name(device)}
    table = "\n".join(f"| {package} | {number} |" for package, number in made_with.items())
    config = run_dir / "config.yaml"
    return {
        "config": _block(config.read_text(encoding="utf-8") if config.is_file() else ""),
        "versions": f"| what | version |\n| --- | --- |\n{table}",
        "command": _block(" \\\n    ".join(shlex.quote(word) for word in [Path(sys.executable).name, *sys.orig_argv[1:]])),
    }


def _block(text: str) -> str:
    """Indented, so that Markdown leaves it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def layout(groups: dict[str, Charts]) -> Summary:
    """The layout of the custom-scalars page: charts, each of the tags that match wholly, in all runs."""
    categories = [
        Category(
            title=title,
            closed=title in CLOSED,
            chart=[
                Chart(title=name, multiline=MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
                for name, tags in charts.items()
            ],
        )
        for title, charts in groups.items()
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
