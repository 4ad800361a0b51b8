"""The plan of a run: text, shards, teacher, and of each stage its steps, time and cost under each ZeRO stage; with advice."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill.config import RunConfig
from distill.corpus import read_rows
from distill.corpus.text_config import SourceConfig
from distill.plan.architectures import Architecture, architecture_of
from distill.plan.devices import Cluster
from distill.plan.shapes import Chunks, Growth, TaskShape, task_shape, teacher_shape
from distill.plan.step_cost import HALF, bytes_received, collectives_per_step, rank_memory, step_time
from distill.plan.text_estimate import TextEstimate, estimate_text
from distill.plan.zero_partition import ZeroSettings
from distill.run.files import read_json
from distill.run.sampling import CHUNK_ROWS, CHUNK_ROWS_ON_GPU, TokenBudget, assign_rows, length_order
from distill.student.initial import pooling_and_length
from distill.student.student import PAD_TO
from distill.teacher.endpoint import EndpointTeacher, recorded_dim
from distill.teacher.imported import ImportedVectors
from distill.teacher.precompute import PrecomputeStage
from distill.teacher.token_log import CHARS_PER_TOKEN, FOLDER, Usage, read_usage
from distill.training.tasks.finetune import FinetuneConfig
from distill.training.train_config import TrainConfig

VARIANTS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
MAX_MICRO_BATCH = 1 << 14
WORTH_CHANGING = 0.9  # of a step's time: a smaller difference is within the error of the estimate
FEW_ROWS = 32  # in a micro-batch: matrices are then too small to keep a device busy
TAR_BYTES = 4 * 1024  # of a WebDataset sample: headers and padding
ROW_BYTES = 8 + 4 + 1  # of a text in a shard: hash, offset, line break


@dataclass(frozen=True)
class Inputs:
    """What a plan is made from. teachers: none if vectors are given or come from an endpoint; teacher_dim: of all their vectors
    together. usage: of the endpoint so far."""

    config: RunConfig
    cluster: Cluster
    text: TextEstimate
    teachers: list[Architecture]
    student: Architecture
    teacher_dim: int
    usage: Usage = Usage()  # noqa: RUF009

    @property
    def student_length(self) -> int:
        """The tokens of the student's longest input: its limit, or what the texts have if nothing but the model limits them."""
        section, architecture = self.config.student, self.student
        _, limit = pooling_and_length(section, architecture.settings, architecture.max_length)
        return limit if section.max_length is not None else min(limit, int(self.text.lengths.max()))


def collect_inputs(
    config: RunConfig, cluster: Cluster, *, tokens_per_text: float | None = None, num_texts: int | None = None
) -> Inputs:
    """tokens_per_text, num_texts: instead of estimates. Raises ValueError where text or an architecture is not known."""
    section, init = config.teacher, config.student.init
    teachers = []
    for each in section.models if section.model else []:
        teachers.append(architecture_of(each.model or "", each.revision, each.dimensions))
        if each.dimensions is not None and each.dimensions > teachers[-1].dim:
            raise ValueError(f"teacher.dimensions {each.dimensions} is above the {teachers[-1].dim} dimensions of {each.model}")
    usage = Usage()
    if section.endpoint is not None:
        teacher_dim, usage = _ask_endpoint(config)
    else:
        teacher_dim = sum(each.dim for each in teachers) if teachers else ImportedVectors(section).dim
    student = teachers[0] if init == "teacher" else architecture_of(init, config.student.revision)
    text = estimate_text(config, cluster.assumed, student.folder, tokens_per_text=tokens_per_text, num_texts=num_texts)
    return Inputs(config, cluster, text, teachers, student, teacher_dim, usage)


def _ask_endpoint(config: RunConfig) -> tuple[int, Usage]:
    """The width of an endpoint's vectors, and its usage: of the run where it has begun, else of a request with a few texts."""
    dim = recorded_dim(read_json(config.precompute_dir / "teacher.json"))
    if dim is not None:
        return dim, read_usage(config.precompute_dir / FOLDER)
    teacher = EndpointTeacher(config.teacher)
    teacher.probe()
    return teacher.dim, teacher.log.own


@dataclass(frozen=True)
class Variant:
    """A stage under one DeepSpeed configuration, see `rank_memory`, `bytes_received` and `step_time`.

    largest_micro_batch: in rows; 0 if not even one row fits.
    """

    memory_bytes: dict[str, float]
    bytes_received_per_step: dict[str, float]
    largest_micro_batch: int
    seconds_per_step: dict[str, float]


@dataclass(frozen=True)
class StagePlan:
    """A training stage. frozen_encoder_*: of encoding all texts once, included in `seconds`; deepspeed: the key in variants of
    the config's own DeepSpeed configuration."""

    parameters: int
    trained_parameters: int
    steps: int
    seconds: float
    dollars: float
    frozen_encoder_seconds: float
    frozen_encoder_bytes: float
    deepspeed: str
    variants: dict[str, Variant]

    @property
    def chosen(self) -> Variant:
        return self.variants[self.deepspeed]


@dataclass(frozen=True)
class TeacherPlan:
    """The precompute stage: FLOPs and seconds of embedding all texts but those of shards.reuse."""

    parameters: int
    weight_bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class EndpointPlan:
    """The precompute stage with a teacher behind an endpoint. tokens_from: where their number comes from, in words; dollars:
    None without a price."""

    requests: int
    tokens: float
    tokens_from: str
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """All values of a plan, in bytes, seconds, dollars and FLOPs; dataclasses.asdict makes it JSON. student_length: tokens."""

    num_texts: int
    tokens_per_text: float
    bytes_per_text: float
    student_length: int
    estimated_from: dict[str, str]
    shards: dict[str, float]
    teacher: TeacherPlan | None
    cluster: Cluster
    stages: dict[str, StagePlan]
    seconds: float
    dollars: float
    advice: list[str]
    measured: dict[str, Any] = field(default_factory=dict)
    endpoint: EndpointPlan | None = None


def make_plan(inputs: Inputs, measured: dict[str, Any] | None = None) -> Plan:
    """measured: what calibration found. Raises ValueError for a run that cannot be started."""
    text, cluster = inputs.text, inputs.cluster
    teacher = _teacher(inputs) if inputs.teachers else None
    endpoint = _endpoint(inputs) if inputs.config.teacher.endpoint is not None else None
    stages = {name: plan_stage(inputs, name) for name in inputs.config.training_stages}
    seconds = (teacher.seconds if teacher else 0.0) + sum(stage.seconds for stage in stages.values())
    advice = _teacher_advice(inputs, teacher) if teacher else []
    for name, stage in stages.items():
        advice += _stage_advice(inputs, name, stage)
    return Plan(
        num_texts=text.num_texts,
        tokens_per_text=text.tokens_per_text,
        bytes_per_text=text.bytes_per_text,
        student_length=inputs.student_length,
        estimated_from=text.estimated_from,
        shards=_shards(inputs),
        teacher=teacher,
        cluster=cluster,
        stages=stages,
        seconds=seconds,
        dollars=cluster.dollars(seconds) + ((endpoint.dollars or 0.0) if endpoint else 0.0),
        advice=advice,
        measured=measured or {},
        endpoint=endpoint,
    )


def _shards(inputs: Inputs) -> dict[str, float]:
    rows, section = inputs.text.num_texts, inputs.config.shards
    text, vectors = rows * inputs.text.bytes_per_text, float(rows * HALF * inputs.teacher_dim)
    total = text + vectors + rows * ROW_BYTES + -(-rows // section.block_rows) * TAR_BYTES
    return {"count": -(-rows // section.rows), "text_bytes": text, "vector_bytes": vectors, "bytes": total}


def _teacher(inputs: Inputs) -> TeacherPlan:
    cluster, text, flops = inputs.cluster, inputs.text, 0.0
    shapes = [teacher_shape(each, is_bf16=cluster.is_bf16) for each in inputs.teachers]
    stage = inputs.config.stage_of("precompute")
    assert isinstance(stage, PrecomputeStage)
    reused = stage.reused_runs(inputs.config.teacher.precision)
    models = zip(inputs.config.teacher.models, inputs.teachers, shapes, strict=True)
    for number, (section, model, shape) in enumerate(models):
        lengths = text.truncated(section.max_length or model.max_length).lengths.tolist()
        flops_per_text = shape.forward_flops([(1, length) for length in lengths]) / len(lengths)
        num_reused = sum(len(run) for run in reused if number in run.encoders)  # all of them are assumed to be in the text
        flops += flops_per_text * max(0, text.num_texts + text.num_held_out - num_reused)
    seconds = flops / (cluster.peak_flops * cluster.device.teacher * cluster.ranks * cluster.assumed.padding)
    return TeacherPlan(sum(s.num_parameters for s in shapes), sum(s.weight_bytes for s in shapes), flops, seconds)


def _endpoint(inputs: Inputs) -> EndpointPlan:
    section, text, usage = inputs.config.teacher.endpoint, inputs.text, inputs.usage
    assert section is not None
    prepared = read_json(inputs.config.precompute_dir / "text" / "manifest.json")
    chars = prepared["lengths"]["mean_chars"] if prepared else text.bytes_per_text
    chars += float(np.mean([len(_prompt_before(inputs.config, each)) for each in inputs.config.text.sources]))
    rows = text.num_texts + text.num_held_out
    per_request = max(1, min(section.texts_per_request, int(section.chars_per_request / chars)))
    is_known = usage.requests > 0 and not usage.is_estimate
    tokens = rows * chars * (usage.tokens_per_character if is_known else 1 / CHARS_PER_TOKEN)
    price = section.price_per_million_tokens
    return EndpointPlan(
        requests=-(-rows // per_request),
        tokens=tokens,
        tokens_from=f"as the server counted {usage.characters:,} characters" if is_known else f"characters / {CHARS_PER_TOKEN}",
        dollars=None if price is None else price * tokens / 1e6,
    )


def _prompt_before(config: RunConfig, source: SourceConfig) -> str:
    return source.prompt if source.prompt is not None else config.teacher.prompt or ""


def plan_stage(inputs: Inputs, name: str) -> StagePlan:
    """The plan of stage `name`. Raises ValueError if its batch is smaller than the ranks or larger than the data."""
    config, cluster, text = inputs.config, inputs.cluster, inputs.text.truncated(inputs.student_length)
    train = config.train(name)
    if train.global_batch < cluster.ranks:
        raise ValueError(
            f"{name}.global_batch {train.global_batch} is smaller than {cluster.ranks} ranks: raise it, or plan fewer devices"
        )
    on_cpu = cluster.device_name == "cpu"
    shape = task_shape(config, name, inputs.student, inputs.teacher_dim, is_bf16=cluster.is_bf16, on_cpu=on_cpu)
    micro_batches = typical_batch(text, train, cluster.ranks, CHUNK_ROWS if on_cpu else CHUNK_ROWS_ON_GPU)
    chosen = config.engine.deepspeed
    paths = {each: Path(f"configs/deepspeed/{each}.json") for each in VARIANTS} | {chosen.stem: chosen}
    zeros = {stem: ZeroSettings.load(path) for stem, path in sorted(paths.items())}
    variants = {stem: _variant(inputs, shape, zero, micro_batches) for stem, zero in zeros.items()}
    steps = _num_steps(train, text)
    dev_texts = (steps // train.dev_every + 1) * config.evaluate.dev_sentences
    frozen_texts = 0 if shape.flops_factor else text.num_texts
    frozen_seconds = _forward_seconds(shape.forward_flops, frozen_texts, text, cluster)
    seconds = steps * variants[chosen.stem].seconds_per_step["total"] + frozen_seconds
    seconds += _forward_seconds(shape.forward_flops, dev_texts, text, cluster)
    return StagePlan(
        parameters=shape.num_parameters,
        trained_parameters=shape.num_trained,
        steps=steps,
        seconds=seconds,
        dollars=cluster.dollars(seconds),
        frozen_encoder_seconds=frozen_seconds,
        frozen_encoder_bytes=float(HALF * shape.encoder_dim * frozen_texts),
        deepspeed=chosen.stem,
        variants=variants,
    )


def typical_batch(text: TextEstimate, train: TrainConfig, ranks: int, chunk_rows: int = CHUNK_ROWS) -> list[Chunks]:
    """The chunks (rows, padded tokens) of each of rank 0's micro-batches of a typical global batch."""
    places = (np.arange(train.global_batch) + 0.5) * len(text.lengths) / train.global_batch
    lengths = text.lengths[places.astype(np.int64)]
    lengths = lengths[length_order(lengths)]
    size: int | TokenBudget = train.micro_batch
    if (tokens := token_limit(train)) is not None:
        exact = np.array([1, lengths[0]])  # the lengths are tokens already
        size = TokenBudget(tokens, exact, exact)
    micro_batches = assign_rows(lengths, rank=0, world_size=ranks, micro_batch=size, chunk_rows=chunk_rows)
    return [[(len(c), float(-(-lengths[c].max() // PAD_TO) * PAD_TO)) for c in chunks if len(c)] for chunks in micro_batches]


def token_limit(train: TrainConfig) -> int | None:
    """The tokens of a micro-batch, where they decide instead of micro_batch."""
    return None if getattr(train, "freeze_encoder", False) else getattr(train, "tokens_per_batch", None)


def longest_rows(train: TrainConfig, ranks: int, student_length: int) -> int:
    """The largest number of rows in a micro-batch of texts that are all as long as possible."""
    tokens = token_limit(train)
    rows = train.micro_batch if tokens is None else max(1, tokens // student_length)
    return min(rows, -(-train.global_batch // ranks))


def _variant(inputs: Inputs, shape: TaskShape, zero: ZeroSettings, micro_batches: list[Chunks]) -> Variant:
    cluster = inputs.cluster

    def memory(rows: int) -> dict[str, float]:  # of texts that are all as long as possible
        longest = (rows * shape.texts_per_row, float(inputs.student_length))
        return rank_memory(shape, zero, cluster.ranks, [longest])

    candidates = range(1, min(_rows_per_rank(shape.train, cluster), MAX_MICRO_BATCH) + 1)
    largest = bisect_right(candidates, cluster.usable_memory, key=lambda rows: memory(rows)["device"])
    sent = collectives_per_step(shape, zero, cluster.ranks, len(micro_batches))
    return Variant(
        memory_bytes=memory(
            sum(rows for rows, _ in micro_batches[0])
            if token_limit(shape.train) is None
            else longest_rows(shape.train, cluster.ranks, inputs.student_length)
        ),
        bytes_received_per_step=bytes_received(sent, cluster.ranks_per_node, cluster.nodes),
        largest_micro_batch=largest,
        seconds_per_step=step_time(shape, zero, cluster, sent, micro_batches),
    )


def _rows_per_rank(train: TrainConfig, cluster: Cluster) -> int:
    return -(-train.global_batch // cluster.ranks)


def _num_steps(train: TrainConfig, text: TextEstimate) -> int:
    """Steps of the training loop. Raises ValueError if the rows do not fill one global batch, or their number is not known."""
    rows = text.num_samples
    if isinstance(train, FinetuneConfig):
        if train.triplets:
            rows = sum(1 for _ in islice(read_rows(train.triplets, train.fields), train.limit))
        elif train.dataset is None:
            rows = min(train.num_mined, text.num_texts)
        elif train.limit is None:
            raise ValueError(f"how many triplets {train.dataset} has is not known here: give finetune.limit=N")
        else:
            rows = train.limit
    if rows < train.global_batch:
        raise ValueError(f"{rows:,} rows do not fill one global batch of {train.global_batch:,}: add text, or lower it")
    steps = math.ceil(train.epochs * (rows // train.global_batch))
    return min(steps, train.max_steps or steps)


def _forward_seconds(flops: Growth, num_texts: int, text: TextEstimate, cluster: Cluster) -> float:
    rate = cluster.peak_flops * cluster.device.student * cluster.ranks
    return flops([(num_texts, text.tokens_per_text)]) / rate


def _teacher_advice(inputs: Inputs, teacher: TeacherPlan) -> list[str]:
    section, room = inputs.config.teacher, inputs.cluster.usable_memory
    if section.placement != "device" or teacher.weight_bytes <= room:
        return []
    placement = "auto" if section.concat else "zero3"  # which takes one encoder
    weights = f"{teacher.weight_bytes / 1e9:.1f} GB"
    return [f"teacher.placement={placement}: its weights take {weights}, and a device has {room / 1e9:.1f}"]


def _stage_advice(inputs: Inputs, name: str, stage: StagePlan) -> list[str]:
    """Settings to change, each with its reason: to the fastest variant that fits, or to the one that fits most rows."""
    train, variants, chosen = inputs.config.train(name), stage.variants, stage.deepspeed
    seconds = {key: each.seconds_per_step["total"] for key, each in variants.items()}
    checkpointing = "" if inputs.config.engine.activation_checkpointing else "engine.activation_checkpointing=true"
    share = _rows_per_rank(train, inputs.cluster)
    wanted = longest_rows(train, inputs.cluster.ranks, inputs.student_length)
    fitting = [key for key, each in variants.items() if each.largest_micro_batch >= wanted]
    if fitting:
        best = min(fitting, key=lambda key: seconds[key])
        ratio = seconds[best] / seconds[chosen]
        reason = f"{ratio:.0%} of a step's time" if chosen in fitting else f"{chosen} does not fit"
        best = chosen if chosen in fitting and ratio > WORTH_CHANGING else best
    else:
        best = max(variants, key=lambda key: (variants[key].largest_micro_batch, key == chosen))
        reason = "it fits more rows"
    rows = min(variants[best].largest_micro_batch, share)
    if not rows:
        remedies = [remedy for remedy in (checkpointing, "larger devices") if remedy]
        return [f"{name}: not even one row fits under any ZeRO stage: {', or '.join(remedies)}"]
    advice = [f"engine.deepspeed=configs/deepspeed/{best}.json for {name}: {reason}"] if best != chosen else []
    by_tokens = token_limit(train) is not None
    size = f"{name}.tokens_per_batch={rows * inputs.student_length}" if by_tokens else f"{name}.micro_batch={rows}"
    if rows > wanted and by_tokens:
        advice.append(f"{size}: it fits")
    elif rows > wanted:
        advice.append(f"{size}: it fits; micro-batches per step: {-(-share // rows)}")
    elif not fitting:
        advice.append(f"{size}: more does not fit")
        if rows < FEW_ROWS and checkpointing:
            advice.append(f"{checkpointing}: activations are computed again layer by layer, and many more rows fit")
    return advice
