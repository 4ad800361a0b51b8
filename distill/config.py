"""One YAML a run: typed, validated, and refused with the nearest known name when a key is wrong.

    base: other.yaml            at most one, relative to this file; its keys are the defaults of this one's
    key.subkey=value            on the command line, parsed as YAML, over both

Every section belongs to one stage and holds that stage's checks; checks across sections are in `RunConfig`.
Nothing is loaded here but the YAML itself, so a mistake costs a second, not an hour.
"""

from __future__ import annotations

import difflib
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Pooling = Literal[
    "mean",
    "cls",
    "pooler",
    "max",
    "first_last_mean",
    "last2_mean",
    "last4_mean",
    "all_mean",
    "last4_max",
    "concat_last4_mean",
]
Precision = Literal["fp32", "bf16", "auto"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TRAINING_STAGES = ("ckd", "simcse", "finetune", "hpd")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key, what is allowed and the fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class SourceConfig(Section):
    """Where sentences come from: local files, a Hugging Face dataset, or this machine's Python docstrings."""

    type: Literal["file", "huggingface", "python-docs"] = Field(description="which of the three")
    path: str | None = Field(None, description="file: a path or glob; .txt .tsv .csv .jsonl .parquet, plain, .gz or .zst")
    name: str | None = Field(None, description="huggingface: the dataset's name")
    subset: str | None = Field(None, description="huggingface: the dataset's configuration")
    split: str = Field("train", description="huggingface: the split")
    revision: str | None = Field(None, description="huggingface: the commit to read")
    field: str | None = Field(None, description="the column or field that holds the sentence, or a list of them (not for .txt)")
    limit: int | None = Field(None, gt=0, description="stop reading this source after so many raw sentences")

    @model_validator(mode="after")
    def _names_what_it_reads(self) -> SourceConfig:
        if self.type == "file" and not self.path:
            raise ValueError("a source of type file needs `path`")
        if self.type == "huggingface" and not (self.name and self.field):
            raise ValueError("a source of type huggingface needs `name` and `field`")
        return self


class TextConfig(Section):
    """The sentences that the teacher embeds: unique, of the right length, one every 50th by hash held out."""

    sources: list[SourceConfig] = Field(
        min_length=1, description="read one after the other; a plain path or glob stands for {type: file, path: ...}"
    )
    min_chars: int = Field(12, ge=1, description="shorter sentences are dropped, and counted")
    max_chars: int = Field(1000, ge=1, description="longer sentences are dropped, and counted")
    max_sentences: int | None = Field(None, gt=0, description="keep about so many, chosen by text hash")
    held_out: int = Field(
        10_000, ge=0, description="how many of the sentences with text hash mod 50 = 0 to embed, for fidelity"
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _paths_are_files(cls, sources: Any) -> Any:
        given = [sources] if isinstance(sources, str) else sources
        if not isinstance(given, list):
            return given
        return [{"type": "file", "path": source} if isinstance(source, str) else source for source in given]

    @model_validator(mode="after")
    def _limits_leave_room(self) -> TextConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}: no sentence can pass")
        return self


class ModelConfig(Section):
    """One encoder of the teacher."""

    model: str | None = Field(
        None, description="a folder, a hub name, or package:NAME/FOLDER for a model that a Python package carries"
    )
    revision: str | None = Field(None, description="a hub model's commit, tag or branch")
    pooling: Literal["cls", "pooler", "mean"] | None = Field(
        None, description="for a plain encoder, which does not say how it pools; a sentence-transformers folder does"
    )
    max_length: int | None = Field(
        None, gt=2, description="tokens; longer sentences are truncated; null takes the model's own limit"
    )
    prompt: str | None = Field(None, description="put before every sentence; null takes the model's own default, if it has one")
    prompt_name: str | None = Field(None, description="instead: the name of one of the model's own prompts")

    @model_validator(mode="after")
    def _one_prompt(self) -> ModelConfig:
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("give `prompt` or `prompt_name`, not both")
        return self


class TeacherConfig(ModelConfig):
    """What embeds the text: an encoder, several side by side (`concat`), or vectors that are there already."""

    concat: list[ModelConfig] = Field(
        [], description="further encoders (model to prompt_name); their vectors follow the first one's"
    )
    vectors: str | None = Field(
        None, description="instead of a model: .npy or .parquet with a vector for each raw sentence of the text, in order"
    )
    vectors_field: str = Field("embedding", description="vectors in parquet: the column that holds them")
    precision: Precision = Field("auto", description="auto: bf16 where the processor has it")
    tokens_per_batch: int = Field(8192, gt=0, description="padded tokens in one forward pass")
    tasks: int = Field(1, ge=1, description="processes that pipeline.py starts for precompute")
    placement: Literal["device", "auto", "zero3"] = Field(
        "device",
        description="auto: over all GPUs, memory and disk, by accelerate; zero3: over the ranks that precompute.py runs on",
    )
    max_memory: dict[str, str] | None = Field(
        None,
        description='placement auto: what may be used, e.g. {"0": 70GiB, cpu: 100GiB}; the rest stays on disk',
    )

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.vectors is None):
            raise ValueError("teacher needs either `model` or `vectors`, not both and not neither")
        if self.concat and (self.vectors is not None or any(other.model is None for other in self.concat)):
            raise ValueError("teacher.concat needs a `model` in teacher and in each of its entries")
        if self.placement == "zero3" and self.concat:
            raise ValueError("teacher.placement zero3 is for one encoder; teacher.concat has several")
        if self.max_memory is not None and self.placement != "auto":
            raise ValueError("teacher.max_memory is for placement auto")
        return self

    @property
    def models(self) -> list[ModelConfig]:
        """All encoders, in the order of their dimensions."""
        return [self, *self.concat]


class ShardsConfig(Section):
    """How sentences and their vectors are cut into WebDataset tars."""

    rows: int = Field(65_536, gt=0, description="sentences a shard")
    block_rows: int = Field(1024, gt=0, description="sentences a WebDataset sample")


class StudentConfig(Section):
    """The encoder that is trained, and how it pools."""

    init: str = Field("teacher", description="teacher, or a folder, hub name or package:NAME/FOLDER of an encoder")
    from_scratch: bool = Field(False, description="keep init's architecture and tokenizer, draw new weights")
    revision: str | None = Field(None, description="a hub encoder's commit, tag or branch")
    layers: int | list[int] | None = Field(
        None, description="keep so many layers of init, evenly spread, or these, in this order, from 0; null keeps all"
    )
    freeze_embeddings: bool = Field(False, description="train no token embeddings: a third of the gradients of a small student")
    pooling: Pooling = Field("mean", description="how token vectors become one; last4: the mean of the last four layers")
    max_length: int = Field(64, gt=2, description="tokens; longer sentences are truncated")

    @model_validator(mode="after")
    def _layers_are_layers(self) -> StudentConfig:
        if isinstance(self.layers, int):
            if self.layers < 1:
                raise ValueError(f"student.layers {self.layers} must be 1 or more")
        elif self.layers is not None and (len(set(self.layers)) < max(1, len(self.layers)) or min(self.layers) < 0):
            raise ValueError(f"student.layers {self.layers} must be distinct, not negative and at least one")
        return self

    def kept(self, depth: int) -> list[int]:
        """The layers that are kept of an encoder with `depth` of them: 3 of 6 are 0, 2, 5.

        Raises ValueError if it has not that many.
        """
        if not isinstance(self.layers, int):
            layers = list(range(depth)) if self.layers is None else self.layers
            if max(layers) >= depth:
                raise ValueError(f"student.layers {layers}: the encoder has layers 0 to {depth - 1}")
            return layers
        if self.layers > depth:
            raise ValueError(f"student.layers {self.layers}: the encoder has {depth}")
        gaps = max(1, self.layers - 1)
        return [(2 * number * (depth - 1) + gaps - 1) // (2 * gaps) for number in range(self.layers)]


class TrainConfig(Section):
    """What every training stage has. The global batch is the config; accumulation follows from it."""

    epochs: float = Field(1.0, gt=0, description="passes over the training sentences; may be a fraction")
    max_steps: int | None = Field(None, gt=0, description="stop after so many steps, whatever `epochs` says")
    global_batch: int = Field(256, gt=1, description="sentences a step, over all ranks")
    micro_batch: int = Field(64, gt=0, description="at most so many sentences in one forward pass of one rank")
    lr: float = Field(2e-4, gt=0, description="AdamW's highest learning rate; after the warm-up it falls to 0 as a cosine")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's averages of gradients and of their squares")
    eps: float = Field(1e-8, gt=0, description="AdamW's, against division by 0")
    weight_decay: float = Field(0.0, ge=0, description="on matrices only; not on biases, norms or the temperature")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps in which the rate rises from 0")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    merge: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the weights that are kept, so large a share is the trained ones and the rest those that the stage began"
        " with: an encoder that was good before forgets less (WiSE-FT, LM-Cocktail); null keeps the trained ones",
    )
    dev_every: int = Field(100, gt=0, description="steps between dev evaluations")
    patience: int | None = Field(None, gt=0, description="stop after so many dev evaluations without a better one")
    save_every: int = Field(100, gt=0, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    log_every: int = Field(10, gt=0, description="steps between TensorBoard points")


class TemperatureConfig(Section):
    """Logits are exp(logit_scale) * cosine; `scale` is exp(logit_scale) at the start."""

    scale: float = Field(20.0, gt=0, description="the paper starts at e = 2.718, and 150 steps later is still at 2.80")
    max_scale: float = Field(100.0, gt=0, description="logit_scale is clamped here")
    learnable: bool = Field(True, description="train logit_scale; else it stays at `scale`")
    lr: float | None = Field(None, gt=0, description="its own learning rate; null takes the stage's")

    @model_validator(mode="after")
    def _starts_below_its_clamp(self) -> TemperatureConfig:
        if self.scale > self.max_scale:
            raise ValueError(f"scale {self.scale} is above max_scale {self.max_scale}")
        return self


class KeysConfig(TrainConfig):
    """Contrast of students with teacher vectors: those of the global batch and, queued, of batches before it."""

    weights: dict[str, float] = Field(description="the loss is this weighted sum")
    queue: int = Field(16_384, ge=0, description="past teacher vectors kept as further negatives")
    queue_placement: Literal["replicated", "sharded"] = Field(
        "replicated", description="sharded: a rank holds a W-th of the queue; for queues that one device does not hold"
    )
    prefill: bool = Field(False, description="begin with a full queue, of the text's own vectors; else it fills step by step")
    temperature: TemperatureConfig = Field(TemperatureConfig(), description="of the ckd term")
    same_meaning: float | None = Field(
        None, gt=0, le=1, description="keys that the teacher finds this similar to the row's own are no negatives of it"
    )
    group_shuffling: bool = Field(False, description="congen: shuffle the teacher's similarities in groups of like probability")
    teacher_temperature: float = Field(0.05, gt=0, description="congen: softness of the teacher's labels")
    student_temperature: float = Field(0.05, gt=0, description="congen: softness of the student's")
    tile: int = Field(4096, gt=0, description="keys held against a micro-batch at a time")

    @property
    def needs_keys(self) -> bool:
        """Whether any term holds a row against others than its own."""
        return any(self.weights.get(name) for name in ("ckd", "congen"))

    @model_validator(mode="after")
    def _terms_and_keys_fit(self) -> KeysConfig:
        if not any(self.weights.values()) or min(self.weights.values()) < 0:
            raise ValueError(f"weights {self.weights} need at least one above 0 and none below")
        if self.needs_keys and self.queue and self.queue <= self.global_batch:
            raise ValueError(
                f"queue {self.queue} is not larger than global_batch {self.global_batch}: one push would replace it all;"
                " use 0 for no queue or a larger one"
            )
        if self.group_shuffling and (self.queue_placement == "sharded" or not self.weights.get("congen")):
            raise ValueError("group_shuffling is of congen's soft labels, and needs all keys on every rank (queue_placement)")
        if self.same_meaning is not None and not self.weights.get("ckd"):
            raise ValueError("same_meaning is of the ckd term, which has no weight")
        return self


class CkdConfig(KeysConfig):
    """Contrastive knowledge distillation (DistilCSE), as a weighted sum with a term that keeps the geometry."""

    weights: dict[Literal["ckd", "congen", "cosine", "mse"], float] = Field(  # type: ignore[assignment]
        default={"ckd": 1.0, "cosine": 10.0}, description="the loss is this weighted sum; {ckd: 1} is the paper's"
    )
    projection: Literal["auto", "linear", "pca", "procrustes", "none"] = Field(
        "auto",
        description="to the teacher's width. auto: none where they agree, else linear; pca, procrustes: fitted to the shards,"
        " then fixed",
    )
    projection_width: int | None = Field(None, gt=0, description="checked against the teacher's width; null takes it")


class ContrastConfig(TrainConfig):
    """What the stages have in which students are held against each other, over all ranks.

    Where micro_batch is less than a rank's share of global_batch, gradients are cached: the same step in less memory.
    """

    temperature: TemperatureConfig = Field(TemperatureConfig(learnable=False), description="tau is 1 / scale")
    teacher_weight: float = Field(
        0.0, ge=0, description="weight of 1 - cosine to the teacher, on as many sentences of the shards a step: forgets less"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="null keeps the encoder's own")


class FinetuneConfig(ContrastConfig):
    """Supervised contrastive fine-tuning on (anchor, positive, hard negative)."""

    lr: float = Field(5e-5, gt=0, description="as in the section ckd")
    init: Literal["ckd", "simcse", "hpd"] = Field("ckd", description="the stage whose student is fine-tuned")
    triplets: str | None = Field(None, description="a .tsv, .csv, .jsonl or .parquet file; null mines them from the shards")
    fields: tuple[str, str, str] = Field(("anchor", "positive", "hard_negative"), description="their columns in it")
    dataset: str | None = Field(None, description="instead of a file: the name of a Hugging Face dataset with these columns")
    subset: str | None = Field(None, description="dataset: its configuration")
    split: str = Field("train", description="dataset: its split")
    limit: int | None = Field(None, gt=0, description="read no more triplets than these first")
    num_mined: int = Field(20_000, gt=0, description="triplets to mine where there is no file")
    mining_pool: int = Field(50_000, gt=0, description="sentences that mined neighbours are looked for in")
    positive_range: tuple[float, float] = Field((0.6, 0.98), description="teacher cosine of a mined positive")
    negative_rank: int = Field(50, gt=1, description="a mined hard negative is the neighbour of this rank")


class SimcseConfig(ContrastConfig):
    """Unsupervised SimCSE on the text of the shards: a sentence under two dropout masks is a positive pair."""

    lr: float = Field(1e-5, gt=0, description="as in the section ckd")
    global_batch: int = Field(128, gt=1, description="sentences a step, over all ranks, each under two masks")
    init: Literal["student", "ckd", "finetune"] = Field(
        "student", description="the stage whose student goes on; student: the encoder that the section student describes"
    )

    @model_validator(mode="after")
    def _views_differ(self) -> SimcseConfig:
        if self.dropout == 0:
            raise ValueError("simcse.dropout is 0: the two views of a sentence would be the same")
        return self


class HpdConfig(KeysConfig):
    """Homomorphic projective distillation: the student's vectors become the PCA of the teacher's.

    The head begins as the teacher's components after CKD's projection, where there was one to learn, else as the ridge
    regression of the targets on the student's vectors.
    """

    weights: dict[Literal["pca", "cosine", "relational", "ckd", "congen"], float] = Field(  # type: ignore[assignment]
        default={"pca": 1.0},
        description="the loss is this weighted sum. pca: the paper's squared error; cosine: of every nested size; relational:"
        " how like a batch's sentences are to each other, at every nested size as the teacher's whole vectors have it, with"
        " congen's temperatures; ckd, congen: as in the section ckd, against the teacher's compact vectors",
    )
    init: Literal["student", "ckd", "simcse", "finetune"] = Field(
        "finetune", description="the stage whose student is compressed; student: the encoder that the section student describes"
    )
    dim: int = Field(128, gt=0, description="dimensions of the compact vectors")
    nested: list[int] = Field(
        [64, 32], description="sizes below `dim` that cosine and relational train, and that are evaluated and exported"
    )
    head: Literal["tanh", "linear"] = Field("tanh", description="linear + tanh is the paper's; linear has no activation")
    freeze_encoder: bool = Field(False, description="train the head alone")
    whitening: float = Field(
        0.0,
        ge=0,
        le=1,
        description="relational: the teacher's directions are divided by their standard deviation to this power before one"
        " looks how like sentences are; 0.25 is better for search, and no worse for STS",
    )

    @model_validator(mode="after")
    def _nested_sizes_fit(self) -> HpdConfig:
        if any(not 0 < size < self.dim for size in self.nested):
            raise ValueError(f"hpd.nested {self.nested} must lie between 0 and hpd.dim {self.dim}")
        return self

    @model_validator(mode="after")
    def _whitening_has_relations(self) -> HpdConfig:
        if self.whitening and not self.weights.get("relational"):
            raise ValueError(
                "hpd.whitening changes the relational term alone: add `relational` to hpd.weights, or leave it out"
            )
        return self


class EngineConfig(Section):
    """How training is spread over ranks: it changes speed and memory, and the student by no more than rounding."""

    deepspeed: Path = Field(
        Path("configs/deepspeed/zero1.json"),
        description="the DeepSpeed configuration; zero1 sends gradients once a step, zero2 and zero3 once a micro-batch",
    )
    precision: Precision = Field("auto", description="auto: bf16 autocast where the processor has it; parameters stay fp32")
    num_ranks: int | None = Field(None, ge=1, description="ranks that pipeline.py starts on a node; null: its GPUs, else 2")
    timeout: float = Field(300.0, gt=0, description="seconds after which a silent peer is an error")
    activation_checkpointing: bool = Field(False, description="compute a layer's activations again in backward: less memory")
    max_skipped: int = Field(5, gt=0, description="steps in a row with a gradient that is not finite, before training stops")


class ExportConfig(Section):
    """What is written of each student, under runs/NAME/export/STAGE."""

    formats: list[Literal["onnx", "onnx-int8"]] = Field(
        [], description="written beside the sentence-transformers folder; they need `bash launcher/install.sh quickstart,onnx`"
    )


class EvaluateConfig(Section):
    """What the table measures; also what training measures on the way."""

    sts: str | None = Field(None, description="a folder with sts12_test.tsv.gz ...; hub; null evaluates fidelity alone")
    retrieval: list[str] | None = Field(None, description="folders in BEIR's layout, or hub:OWNER/NAME")
    precision: list[Literal["float32", "float16", "int8", "binary"]] | None = Field(
        None, description="small vectors that retrieval is also measured with, through faiss"
    )
    rescore: int | None = Field(None, gt=0, description="also re-rank so many times the candidates by larger vectors")
    transfer: list[str] | None = Field(None, description="folders with train.tsv and test.tsv, or hub:OWNER/NAME")
    num_held_out: int = Field(2000, gt=2, description="held-out sentences that fidelity is measured on")
    dev_sentences: int = Field(1000, gt=2, description="held-out sentences of a dev evaluation in training")
    batch_size: int = Field(64, gt=0, description="sentences in one forward pass of an evaluation")


class SearchConfig(Section):
    """The index that the evaluate stage leaves for launcher/search.py."""

    max_sentences: int = Field(200_000, gt=0, description="sentences of the text that launcher/search.py answers from")


class RunConfig(Section):
    """A run: where it lies, what it runs, and a section a stage."""

    name: str = Field(pattern=NAME, description="the run's directory under runs_dir")
    runs_dir: Path = Field(Path("runs"), description="the folder of all runs, on a disk that all nodes see")
    shards_from: str | None = Field(
        None,
        pattern=NAME,
        description="the run under runs_dir that holds the text and the shards, made there if need be; null: this one. For"
        " several students of one teacher and text",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the order of sentences, new weights and dropout")
    stages: list[Literal["precompute", "ckd", "simcse", "finetune", "hpd", "export", "evaluate"]] = Field(
        default=["precompute", "ckd", "finetune", "hpd", "export", "evaluate"], description="what pipeline.py runs"
    )
    stage: Literal["ckd", "simcse", "finetune", "hpd"] = Field("ckd", description="what train.py runs")
    text: TextConfig
    teacher: TeacherConfig
    shards: ShardsConfig = ShardsConfig()
    student: StudentConfig = StudentConfig()
    ckd: CkdConfig = CkdConfig()
    simcse: SimcseConfig = SimcseConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    hpd: HpdConfig = HpdConfig()
    engine: EngineConfig = EngineConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _stages_fit_together(self) -> RunConfig:
        for stage in TRAINING_STAGES[1:]:
            waits_for = [stage]
            while waits_for[-1] in TRAINING_STAGES[1:]:
                waits_for.append(getattr(self, waits_for[-1]).init)
                if waits_for[-1] == stage:
                    chain = ", ".join(f"{a}.init is {b}" for a, b in pairwise(waits_for))
                    raise ValueError(f"{chain}: each waits for the other; set one to ckd")
        if self.teacher.model is None and self.student.init == "teacher":
            raise ValueError("student.init is teacher, but the teacher is a file of vectors; name an encoder in student.init")
        ranks = self.engine.num_ranks or 1
        for stage in TRAINING_STAGES:
            global_batch = getattr(self, stage).global_batch
            if global_batch < ranks:
                raise ValueError(f"{stage}.global_batch {global_batch} is smaller than engine.num_ranks {ranks}")
        return self

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.name

    @property
    def precompute_dir(self) -> Path:
        return self.runs_dir / (self.shards_from or self.name) / "precompute"

    @property
    def shards_dir(self) -> Path:
        return self.precompute_dir.with_name("shards")


def load_config(path: str | Path, overrides: list[str] | None = None, over: Path | None = None) -> RunConfig:
    """Reads `path` and its base, another YAML `over` it, and `key=value` overrides over both into a validated RunConfig.

    Raises ConfigError with the file, the key, what is allowed and, for an unknown key, the nearest known one.
    """
    tree = _read_yaml(Path(path))
    if over is not None:
        tree = _merge(tree, _read_yaml(over))
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value, e.g. ckd.lr=1e-4")
        _set(tree, key.split("."), _parse_value(value, override))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; `load_config` of it gives an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f"; {path.parent} has no such file"
        raise ConfigError(f"no config at {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys; a run needs at least name, text and teacher")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read_yaml(path.parent / base, (*seen, path.resolve())), tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both and key != "weights" else value
    return merged


def _parse_value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            return value
    return value


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[last] = value


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "config"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        return f"unknown key {where}" + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}")
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{where}: {message}{shown}"


def _known_keys(location: list[str]) -> list[str]:
    section: type[Section] = RunConfig
    for part in location:
        if part.isdigit():
            continue
        inner = section_of(section.model_fields[part].annotation)
        assert inner is not None, location
        section = inner
    return list(section.model_fields)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds, alone or in a list; None for a key that holds none."""
    candidates = (annotation, *get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)
