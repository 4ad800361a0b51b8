"""A plan for people: what is there, what each layout holds and sends, how long it takes, and what was assumed."""

from __future__ import annotations

from collections.abc import Sequence

from distill.config import TrainConfig
from distill.plan.plan import Plan, StagePlan, Variant

SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(number: float) -> str:
    """Bytes with a unit: 4.1 GB."""
    unit, name = next(((unit, name) for unit, name in SIZES if number >= unit), (1.0, "B"))
    return f"{number / unit:.3g} {name}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns, the first to the left and the others to the right, a line under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pads = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ["  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def show(plan: Plan) -> str:
    parts = [_corpus(plan), _teacher(plan), *(_stage(plan, stage) for stage in plan.stages), _total(plan), _advice(plan)]
    return "\n\n".join(part for part in [*parts, _assumptions(plan)] if part)


def _corpus(plan: Plan) -> str:
    corpus, bytes_ = plan.corpus, plan.shard_bytes
    return (
        f"corpus: {corpus.sentences:,} sentences ({corpus.how['sentences']}), {corpus.tokens:.1f} tokens each"
        f" ({corpus.how['tokens']})\n"
        f"shards: {bytes_['shards']:,.0f}, {size(bytes_['total'])} = text {size(bytes_['text'])}, vectors of"
        f" {plan.models.dim} x fp16 {size(bytes_['vectors'])}, and hashes and headers"
    )


def _teacher(plan: Plan) -> str:
    if plan.teacher is None:
        return "teacher: vectors are given, nothing is embedded"
    names = " + ".join(str(each.model) for each in plan.config.teacher.models)
    return (
        f"teacher: {names}, {plan.teacher.numel / 1e6:,.1f}M parameters, {size(plan.teacher.bytes)} of weights\n"
        f"precompute: {plan.teacher_operations:.3g} operations, {duration(plan.teacher_seconds)} on"
        f" {plan.cluster.ranks} x {plan.cluster.name}{_cost(plan.cluster.dollars(plan.teacher_seconds))}"
    )


def _stage(plan: Plan, stage: StagePlan) -> str:
    train: TrainConfig = getattr(plan.config, stage.name)
    step, total = stage.step, stage.step.total
    shares = {"forward and backward": step.compute, "loss": step.loss, "optimizer": step.optimizer, "wire": step.collectives}
    divided = ", ".join(f"{name} {value / total:.0%}" for name, value in shares.items())
    once = ""
    if stage.once_bytes:
        once = (
            f"its frozen encoder reads the text once, {duration(stage.once_seconds)} of that; its vectors take"
            f" {size(stage.once_bytes)} of disk until the stage is done\n"
        )
    return (
        f"{stage.name}: {stage.shape.numel() / 1e6:,.1f}M parameters, {stage.shape.numel(trained=True) / 1e6:,.1f}M trained;"
        f" {stage.steps:,} steps of {train.global_batch:,}, {duration(stage.seconds)}{_cost(stage.dollars)}\n"
        f"{once}a step: {duration(total)} = {divided}\n"
        f"bytes of a rank at micro_batch {_rows(plan, train)}, every sentence of {plan.config.student.max_length} tokens;"
        f" > is the config's\n"
        + aligned([_HEAD, *(_variant(plan, variant, variant.name == stage.chosen.name) for variant in stage.variants)])
    )


_HEAD = (
    "layout", "parameters", "gradients", "optimizer", "bucket", "gathered", "queue", "keys", "activations", "loss", "device",
    "host", "largest micro", "sent/step", "between", "rate", "step",
)  # fmt: skip


def _variant(plan: Plan, variant: Variant, is_chosen: bool) -> tuple[str, ...]:
    memory, cluster = variant.memory, plan.cluster
    nodes, a_node = cluster.nodes, cluster.ranks_a_node
    received = sum(each.received(cluster.ranks) for each in variant.sent)
    between = sum(each.between(a_node, nodes) for each in variant.sent)
    categories = (
        memory.parameters, memory.gradients, memory.optimizer, memory.bucket, memory.gathered, memory.queue, memory.keys,
        memory.activations, memory.loss, memory.device, memory.host,
    )  # fmt: skip
    return (
        f"{'>' if is_chosen else ' '} {variant.name}",
        *(size(each) if each else "-" for each in categories),
        f"{variant.fits:,}",
        size(received) if received else "-",
        size(between) if between else "-",
        f"{size(received / variant.step.total)}/s" if received else "-",
        duration(variant.step.total),
    )


def _rows(plan: Plan, train: TrainConfig) -> int:
    return min(train.micro_batch, -(-train.global_batch // plan.cluster.ranks))


def _total(plan: Plan) -> str:
    return f"in all: {duration(plan.seconds)}{_cost(plan.dollars)}"


def _advice(plan: Plan) -> str:
    if not plan.advice:
        return "recommended: the config as it is"
    return "recommended:\n" + "\n".join(f"  {line}" for line in plan.advice)


def _assumptions(plan: Plan) -> str:
    cluster, device, assumed = plan.cluster, plan.cluster.device, plan.cluster.assumed
    precision = "bf16" if cluster.is_bf16 else "fp32"
    lines = [
        f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} x {cluster.ranks_a_node} {cluster.name}: {size(device.memory)} of"
        f" memory each, {assumed.usable:.0%} of it used; {device.peak(cluster.is_bf16) / 1e12:.3g} TFLOP/s in {precision}, of"
        f" which the teacher reaches {device.teacher:.0%} and the student {device.student:.0%};"
        f" {device.fp32 / 1e12:.3g} TFLOP/s in fp32, for the loss; a layer's passes over a chunk take"
        f" {device.launch * 1e3:.2g} ms at least",
        f"links: {size(device.inside)}/s inside a node, {size(device.between)}/s a device between nodes,"
        f" {assumed.latency * 1e6:.0f} us a collective; nothing is sent while something is computed",
        f"{assumed.padding:.0%} of the teacher's tokens are real; text {plan.corpus.text_bytes:.0f} bytes a sentence"
        f" ({plan.corpus.how['text']})",
        f"{device.dollars:.2f} dollars a device and hour" if device.dollars else "no price",
        "ZeRO 3 gathers each weight once a micro-batch; where texts of other lengths change how micro-batches are cut, up to"
        " four times in that step",
        "no time for export and evaluation, for starting, or for reading text; sent/step is what a rank receives, between its"
        " share of what other nodes send, rate the mean over a step",
    ]
    if plan.measured:
        lines.insert(0, f"measured here: {plan.measured['said']}")
    return "assumed:\n" + "\n".join(f"  {line}" for line in lines)


def _cost(dollars: float) -> str:
    return f", {dollars:,.0f} dollars" if dollars >= 10 else f", {dollars:.2f} dollars" if dollars else ""
