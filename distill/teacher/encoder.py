"""The teacher: texts to vectors, by one encoder or by several whose vectors are concatenated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from distill.corpus import TextChunk
from distill.corpus.prepare import source_names
from distill.corpus.text_config import SourceConfig
from distill.run.collectives import add_over_ranks, rank, world_size
from distill.run.precision import autocast_dtype
from distill.run.prompts import ROLE_PROMPTS, Role, role_prompt
from distill.student.encoder import set_cpu_attention
from distill.teacher.batching import Batch, Tokens, can_tokenise, cut, pad, tokenise
from distill.teacher.load import load_model, packed_flops
from distill.teacher.teacher_config import ModelConfig, TeacherConfig

logger = logging.getLogger(__name__)
PACKED_FLOPS = {torch.ops.mkldnn._linear_pointwise: packed_flops}
TEXTS_PER_BATCH = 256  # for models that take texts, not tokens


class Prompted(NamedTuple):
    """Texts for a model that takes no tokens, and the prompt to put before each."""

    prompt: str
    texts: list[str]


class Read(NamedTuple):
    """Texts with the same prompts: their rows among those that are read together, and the input of each encoder."""

    rows: np.ndarray
    inputs: list[Tokens | Prompted]


@dataclass
class Work:
    """Work done: texts of the longest input, texts that no encoder had to read, tokens without and with padding, FLOPs
    (2 x multiply-adds), shapes of batches."""

    at_limit: int = 0
    reused: int = 0
    tokens: int = 0
    padded: int = 0
    flops: int = 0
    shapes: set[tuple[int, int, int]] = field(default_factory=set)  # (encoder, rows, width)


class Teacher:
    """One or several frozen encoders: texts to L2-normalised float16 vectors [n, dim], in the texts' order.

    `read` tokenizes a text chunk and `encode` runs the encoders, so that each can have its own thread. amp: bfloat16 or None.
    The vectors of several encoders are concatenated, each times sqrt(its weight / the sum of weights): a cosine is the weighted
    mean of theirs.
    """

    def __init__(
        self,
        config: TeacherConfig,
        device: torch.device,
        amp: torch.dtype | None,
        *,
        sources: Sequence[SourceConfig] = (),
        offload: Path | None = None,
        only: int | None = None,
    ) -> None:
        """sources: those of the texts that `read` is given, which decide their prompts; none if they have no role. only: the
        number of the one encoder to load, whose part of the concatenated vectors `encode` then returns."""
        self._sources = sources
        place: dict[str, Any] = {}
        if config.placement == "auto":
            limits = {int(key) if key.isdigit() else key: value for key, value in (config.max_memory or {}).items()}
            place = {"device_map": "auto", "max_memory": limits or None, "offload_folder": str(offload)}
        elif config.placement == "zero3":
            place = {"zero3": True}
        self._numbers = range(len(config.models)) if only is None else [only]
        self._divisors = [(sum(config.weights) / config.weights[number]) ** 0.5 for number in self._numbers]
        models = [config.models[number] for number in self._numbers]
        self.encoders = [_Encoder(model, device, amp, config.tokens_per_batch, place) for model in models]
        self.work = Work()

    def __call__(self, texts: Sequence[str], role: Role | None = None) -> np.ndarray:
        """float32 [n, dim], L2-normalised: for evaluation and search.

        role: query or document takes the model's own prompt for it, unless the config names a prompt; None takes the prompt
        that text is embedded with.
        """
        if not len(texts):
            return np.empty((0, self.dim), np.float32)
        inputs = [encoder.read(texts, encoder.prompts[role]) for encoder in self.encoders]
        return self.encode([Read(np.arange(len(texts)), inputs)]).astype(np.float32)

    @cached_property
    def dim(self) -> int:
        return int(self(["width"]).shape[1])

    @property
    def dtype(self) -> str:
        """What its matrix products run in."""
        return str(self.encoders[0].amp or torch.float32).removeprefix("torch.")

    @property
    def params(self) -> int:
        return sum(parameter.numel() for encoder in self.encoders for parameter in encoder.model.parameters())

    def read(self, chunk: TextChunk) -> list[Read]:
        """Tokenises the texts, each with the prompt of its source, without the weights or the device."""
        numbers = np.zeros(len(chunk.texts), np.uint16) if chunk.sources is None or not self._sources else chunk.sources
        prompts_of = [self.prompts(source) for source in self._sources] or [
            [encoder.prompts[None] for encoder in self.encoders]
        ]
        found = []
        for prompts in dict.fromkeys(map(tuple, prompts_of)):
            rows = np.flatnonzero(np.isin(numbers, [n for n, each in enumerate(prompts_of) if tuple(each) == prompts]))
            texts = chunk.texts if len(rows) == len(chunk.texts) else [chunk.texts[row] for row in rows.tolist()]
            if texts:
                inputs = [encoder.read(texts, prompt) for encoder, prompt in zip(self.encoders, prompts, strict=True)]
                found.append(Read(rows, inputs))
        return found

    def prompts(self, source: SourceConfig | None) -> list[str]:
        """What each encoder reads before the texts of a source: the source's prompt, else that of its role."""
        if source is not None and source.prompt is not None:
            return [source.prompt] * len(self.encoders)
        return [encoder.prompts[source.role if source is not None else None] for encoder in self.encoders]

    def encode(self, read: list[Read], tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        """float16 [n, dim], L2-normalised, of what `read` returned. tick: progress callback, called with
        the number of texts finished since its last call."""
        parts = [self._encode(inputs, tick) for _, inputs in read]
        if len(parts) == 1:
            return parts[0]
        vectors = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float16)
        for (rows, _), part in zip(read, parts, strict=True):
            vectors[rows] = part
        return vectors

    def _encode(self, inputs: list[Tokens | Prompted], tick: Callable[[int], object]) -> np.ndarray:
        parts = []
        for encoder, number, divisor, tokens in zip(self.encoders, self._numbers, self._divisors, inputs, strict=True):
            part = encoder.encode(tokens, self.work, number, tick if number == self._numbers[-1] else lambda rows: None)
            parts.append(part if divisor == 1 else part / divisor)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(torch.float16).cpu().numpy()


class _Encoder:
    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        amp: torch.dtype | None,
        tokens_per_batch: int,
        place: dict[str, Any],
    ) -> None:
        self.name = config.model
        self.model = load_model(config, device, amp, **place)
        self.device = device
        self.amp = amp
        self.prompts = {role: prompt_of(self.model, config, role) for role in (None, *ROLE_PROMPTS)}
        self.tokens_per_batch = tokens_per_batch
        with torch.inference_mode():
            self._flops_linear, self._flops_square = self._count_flops()

    def read(self, texts: Sequence[str], prompt: str) -> Tokens | Prompted:
        return tokenise(self.model, texts, prompt) if can_tokenise(self.model) else Prompted(prompt, list(texts))

    @torch.inference_mode()
    def encode(self, read: Tokens | Prompted, work: Work, number: int, tick: Callable[[int], object]) -> torch.Tensor:
        """float32 [n, d] on the device, L2-normalised.

        If the weights are sharded over W ranks, each rank encodes every W-th batch; a forward pass is then a collective, so
        all ranks run the same number of them.
        """
        if not isinstance(read, Tokens):
            return self._encode_texts(*read, tick)
        batches = list(cut(read.lengths, self.tokens_per_batch, self.model.max_seq_length))
        mine = batches[rank() :: world_size()]
        rows, vectors = [], []
        for step in range(-(-len(batches) // world_size())):
            batch = mine[step] if step < len(mine) else batches[-1]
            encoded = self._encode_batch(read, batch)
            if step < len(mine):
                work.shapes.add((number, len(batch.rows), batch.width))
                work.flops += round(len(batch.rows) * (self._flops_linear + self._flops_square * batch.width) * batch.width)
                lengths = read.lengths[batch.rows]
                work.at_limit += int(np.count_nonzero(lengths == self.model.max_seq_length)) if number == 0 else 0
                work.tokens += int(lengths.sum())
                work.padded += batch.rows.size * batch.width
                rows.append(batch.rows)
                vectors.append(encoded)
            tick(sum(len(batch.rows) for batch in batches[step * world_size() : (step + 1) * world_size()]))
        if not mine:
            return add_over_ranks(encoded.new_zeros((len(read.lengths), encoded.shape[1])))
        return add_over_ranks(_in_order(vectors, rows, len(read.lengths)))

    def _encode_batch(self, read: Tokens, batch: Batch) -> torch.Tensor:
        """float32 [rows, d]; from two halves where the whole does not fit into memory, as later ones of its size then.

        Raises ValueError for what cannot be halved: one text, or a batch of a sharded teacher, whose ranks work together.
        """
        rows, width = batch
        can_be_halved = len(rows) > 1 and world_size() == 1
        if not can_be_halved or rows.size * width <= self.tokens_per_batch:
            try:
                return self._forward(pad(self.model, read, batch))
            except torch.OutOfMemoryError:
                if not can_be_halved:
                    fix = "teacher.max_length" if len(rows) == 1 else "teacher.tokens_per_batch"
                    raise ValueError(
                        f"out of memory on {self.device} with a batch of {len(rows)} x {width} tokens: lower {fix}, or use"
                        " another teacher.placement"
                    ) from None
            self.tokens_per_batch = rows.size * width // 2
            torch.cuda.empty_cache()
            logger.warning("out of memory: teacher.tokens_per_batch is %d from here on", self.tokens_per_batch)
        halves = np.array_split(rows, 2)
        return torch.cat([self._encode_batch(read, Batch(half, width)) for half in halves])

    def _encode_texts(self, prompt: str, texts: list[str], tick: Callable[[int], object]) -> torch.Tensor:
        order = np.array(sorted(range(len(texts)), key=lambda row: -len(texts[row])))
        rows = np.array_split(order, range(TEXTS_PER_BATCH, len(order), TEXTS_PER_BATCH))
        vectors = []
        for chosen in rows:
            features = self.model.preprocess([texts[row] for row in chosen], prompt=prompt or None)
            vectors.append(self._forward(features))
            tick(len(chosen))
        return _in_order(vectors, rows, len(order))

    def _count_flops(self) -> tuple[float, float]:
        """(a, b): a text of w tokens takes a w + b w^2 FLOPs (2 x multiply-adds), from two forward passes."""
        tokens, counts = self.read(["what does it take"], self.prompts[None]), []
        if not isinstance(tokens, Tokens):
            return 0.0, 0.0
        for width in (8, 16):
            flat = {name: np.resize(values, width) for name, values in tokens.flat.items()}
            one = Tokens(flat, np.array([0, width]), tokens.shared)
            with FlopCounterMode(display=False, custom_mapping=PACKED_FLOPS) as counter:
                self._forward(pad(self.model, one, Batch(np.array([0]), width)))
            counts.append(counter.get_total_flops())
        square = (counts[1] - 2 * counts[0]) / 128
        return counts[0] / 8 - 8 * square, square

    def _forward(self, features: dict[str, Any]) -> torch.Tensor:
        features = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        encoder = getattr(self.model[0], "model", None)
        if self.device.type == "cpu" and isinstance(encoder, PreTrainedModel):
            set_cpu_attention(encoder, features["attention_mask"].shape[1])
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            vectors = self.model(features)["sentence_embedding"]
        return torch.nn.functional.normalize(vectors[:, : self.model.truncate_dim].float(), dim=-1)


def describe_prompts(teacher: Teacher, sources: Sequence[SourceConfig]) -> list[str]:
    """Which prompts the texts are embedded with, a line for each encoder, and which of the model's own are not used."""
    names, lines = source_names([source.model_dump() for source in sources]), []
    for number, encoder in enumerate(teacher.encoders):
        used = {name: teacher.prompts(source)[number] for name, source in zip(names, sources, strict=True)}
        own = sorted(name for name, prompt in encoder.model.prompts.items() if prompt)
        if any(used.values()):
            lines.append("prompts: " + ", ".join(f"{name} {prompt!r}" for name, prompt in used.items()))
        elif own:
            lines.append(
                f"no prompt is put before the texts, though {encoder.name} has {', '.join(own)}: text.sources[].role,"
                " teacher.prompt_name or teacher.prompt chooses one"
            )
    return lines


def evaluation_dtype(config: TeacherConfig, device: torch.device) -> torch.dtype | None:
    """The teacher's precision for evaluation and search: bfloat16 or None (float32), which it also is for bf16 on a device that
    does not have it, since no vectors are kept."""
    return autocast_dtype("auto" if config.precision == "bf16" else config.precision, device)


def prompt_of(model: SentenceTransformer, config: ModelConfig, role: Role | None = None) -> str:
    """The prompt put before every text: `prompt`, or the model's own prompt named `prompt_name`, or its default prompt.

    Where neither is given, a `role` has the model's prompt for it. Raises ValueError for a name that the model does not have.
    """
    if config.prompt is not None:
        return config.prompt
    if config.prompt_name is None:
        return role_prompt(model.prompts, model.default_prompt_name, role)
    if config.prompt_name not in model.prompts:
        raise ValueError(f"teacher.prompt_name {config.prompt_name!r}: {config.model} has the prompts {sorted(model.prompts)}")
    return model.prompts[config.prompt_name] or ""


def _in_order(vectors: list[torch.Tensor], rows: Sequence[np.ndarray], total: int) -> torch.Tensor:
    """The vectors of batches in the order of their rows, [total, d]; zeros for rows without a vector."""
    joined = torch.cat(vectors)
    ordered = joined.new_zeros((total, joined.shape[1]))
    ordered[torch.from_numpy(np.concatenate(rows)).to(joined.device)] = joined
    return ordered
