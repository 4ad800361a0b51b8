"""A plan as text: text and shards, precompute, each stage under each ZeRO stage, advice, and the assumptions."""

from __future__ import annotations

from distill.config import RunConfig
from distill.plan.planner import Plan, StagePlan, Variant, longest_rows
from distill.run.formatting import format_bytes, format_duration, format_table


def format_plan(plan: Plan, config: RunConfig) -> str:
    """The plan of the run that `config` describes."""
    stages = [_stage(plan, config, name, stage) for name, stage in plan.stages.items()]
    total = f"total: {format_duration(plan.seconds)}{_cost(plan.dollars)}"
    advice = "\n  ".join(["recommended:", *plan.advice]) if plan.advice else "recommended: the config as it is"
    assumptions = "\n  ".join(["assumptions:", *_assumptions(plan)])
    return "\n\n".join([_text(plan), _teacher(plan, config), *stages, total, advice, assumptions])


def _text(plan: Plan) -> str:
    shards, sources = plan.shards, plan.estimated_from
    return (
        f"text: {plan.num_texts:,} texts ({sources['num_texts']}), {plan.tokens_per_text:.1f} tokens each"
        f" ({sources['tokens_per_text']})\n"
        f"shards: {shards['count']:,.0f}, {format_bytes(shards['bytes'])}, of these text {format_bytes(shards['text_bytes'])}"
        f" and float16 vectors {format_bytes(shards['vector_bytes'])}"
    )


def _teacher(plan: Plan, config: RunConfig) -> str:
    section, endpoint = config.teacher.endpoint, plan.endpoint
    if section is not None and endpoint is not None:
        cost = "set teacher.endpoint.price_per_million_tokens for its cost"
        if endpoint.dollars is not None:
            cost = f"{endpoint.dollars:,.2f} dollars"
        return (
            f"teacher: {section.model} at {section.host}\n"
            f"precompute: {endpoint.requests:,} requests, {endpoint.tokens:,.0f} tokens ({endpoint.tokens_from}); {cost};"
            " its time depends on the server"
        )
    if plan.teacher is None:
        return "teacher: its vectors are given"
    names = " + ".join(str(each.model) for each in config.teacher.models)
    return (
        f"teacher: {names}, {plan.teacher.parameters / 1e6:,.1f}M parameters, {format_bytes(plan.teacher.weight_bytes)}\n"
        f"precompute: {plan.teacher.flops:.3g} FLOPs, {format_duration(plan.teacher.seconds)} on"
        f" {plan.cluster.ranks} x {plan.cluster.device_name}{_cost(plan.cluster.dollars(plan.teacher.seconds))}"
    )


def _stage(plan: Plan, config: RunConfig, name: str, stage: StagePlan) -> str:
    train, step = config.train(name), dict(stage.chosen.seconds_per_step)
    total = step.pop("total")
    lines = [
        f"{name}: {stage.parameters / 1e6:,.1f}M parameters, {stage.trained_parameters / 1e6:,.1f}M trained;"
        f" {stage.steps:,} steps of {train.global_batch:,}, {format_duration(stage.seconds)}{_cost(stage.dollars)}"
    ]
    if stage.frozen_encoder_bytes:
        lines.append(
            f"the frozen encoder encodes all texts once, in {format_duration(stage.frozen_encoder_seconds)} of this; their"
            f" vectors take {format_bytes(stage.frozen_encoder_bytes)} of disk until the stage is finished"
        )
    parts = ", ".join(f"{activity} {seconds / total:.0%}" for activity, seconds in step.items())
    rows = longest_rows(train, plan.cluster.ranks, plan.student_length)
    lines += [
        f"one step: {format_duration(total)}: {parts}",
        f"memory of a rank with a micro-batch of {rows} texts of {plan.student_length:,} tokens; > marks the config's:",
    ]
    marked = {f"{'>' if key == stage.deepspeed else ' '} {key}": _columns(variant) for key, variant in stage.variants.items()}
    header = ["deepspeed", *_columns(stage.chosen)]
    return "\n".join([*lines, format_table(header, [[key, *columns.values()] for key, columns in marked.items()])])


def _columns(variant: Variant) -> dict[str, str | None]:
    """A line of the table, by the columns' names."""
    received, seconds = variant.bytes_received_per_step, variant.seconds_per_step["total"]
    return {category.replace("_", " "): _bytes(size) for category, size in variant.memory_bytes.items()} | {
        "largest micro_batch": f"{variant.largest_micro_batch:,}",
        "received/step": _bytes(received["total"]),
        "between nodes": _bytes(received["between_nodes"]),
        "average rate": _bytes(received["total"] / seconds, "/s"),
        "step": format_duration(seconds),
    }


def _assumptions(plan: Plan) -> list[str]:
    cluster, device, assumed = plan.cluster, plan.cluster.device, plan.cluster.assumed
    peak = cluster.peak_flops / 1e12
    measured = [f"measured on this machine: {plan.measured['summary']}"] if plan.measured else []
    return [
        *measured,
        f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.ranks_per_node} {cluster.device_name}, each with"
        f" {format_bytes(device.memory)} of memory ({assumed.usable:.0%} usable) and {peak:.3g} TFLOP/s in"
        f" {'bf16' if cluster.is_bf16 else 'fp32'}; MFU of the teacher {device.teacher:.0%}, of the student"
        f" {device.student:.0%}; losses in fp32 at {device.fp32 / 1e12:.3g} TFLOP/s; at least {device.launch * 1e3:.2g} ms"
        " for a layer's forward and backward pass",
        f"links: {format_bytes(device.inside)}/s inside a node, {format_bytes(device.between)}/s per device between nodes,"
        f" {assumed.latency * 1e6:.0f} us per collective; communication does not overlap with computation",
        f"padding is {1 - assumed.padding:.0%} of the teacher's tokens; {plan.bytes_per_text:.0f} bytes per text"
        f" ({plan.estimated_from['bytes_per_text']})",
        f"{device.dollars:.2f} dollars per device and hour" if device.dollars else "no price",
        "ZeRO 3 gathers each weight once per micro-batch; up to four times in a step whose texts are cut into other chunks",
        "no time for start, reading text, export and evaluation",
    ]


def _bytes(num_bytes: float, unit: str = "") -> str | None:
    return f"{format_bytes(num_bytes)}{unit}" if num_bytes else None


def _cost(dollars: float) -> str:
    return f", {dollars:,.0f} dollars" if dollars >= 10 else f", {dollars:.2f} dollars" if dollars else ""
