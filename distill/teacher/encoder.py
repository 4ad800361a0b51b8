"""The teacher: sentences to vectors, by one encoder or several whose vectors are put side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

from distill.config import ModelConfig, TeacherConfig
from distill.teacher.load import load_model, packed_flops
from distill.teacher.tokens import Batch, Tokens, can_tokenise, cut, pad, tokenise
from distill.training.distributed import add_over_ranks, rank, world_size

PACKED_FLOPS = {torch.ops.mkldnn._linear_pointwise: packed_flops}
SENTENCES_PER_BATCH = 256  # for models that read no tokens

Read = list[Tokens | list[str]]  # what each encoder reads, of the same sentences


@dataclass
class Work:
    """What was computed: tokens that are real, tokens with padding, operations (2 x multiply-adds), shapes of batches."""

    tokens: int = 0
    padded: int = 0
    flops: int = 0
    shapes: set[tuple[int, int, int]] = field(default_factory=set)  # (encoder, rows, width)


class Teacher:
    """read(sentences) on one thread, encode(...) on another -> L2-normalised fp16 vectors [n, dim], in the sentences' order.

    amp: bfloat16 or None. Of several encoders, each one's vectors are normalised, concatenated, and divided by the square root
    of their number: the cosine of the whole is the mean of the cosines.
    """

    def __init__(
        self, config: TeacherConfig, device: torch.device, amp: torch.dtype | None, *, offload: Path | None = None
    ) -> None:
        place: dict[str, Any] = {}
        if config.placement == "auto":
            limits = {int(key) if key.isdigit() else key: value for key, value in (config.max_memory or {}).items()}
            place = {"device_map": "auto", "max_memory": limits or None, "offload_folder": str(offload)}
        elif config.placement == "zero3":
            place = {"zero3": True}
        self.encoders = [_Encoder(model, device, amp, config.tokens_per_batch, place) for model in config.models]
        self.work = Work()

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """float32 [n, dim], L2-normalised: the teacher as evaluation and search see it."""
        return self.encode(self.read(sentences)).astype(np.float32)

    @cached_property
    def dim(self) -> int:
        return int(self(["width"]).shape[1])

    @property
    def params(self) -> int:
        return sum(parameter.numel() for encoder in self.encoders for parameter in encoder.model.parameters())

    def read(self, sentences: Sequence[str], numbers: np.ndarray | None = None) -> Read:
        """Tokenises. Touches neither the weights nor the device."""
        return [encoder.read(sentences) for encoder in self.encoders]

    def encode(self, read: Read, tick: Callable[[int], object] = lambda rows: None) -> np.ndarray:
        """float16 [n, dim], L2-normalised, of what `read` returned. `tick` is told the sentences of each batch under way."""
        parts = [
            encoder.encode(tokens, self.work, number, tick if number == len(self.encoders) - 1 else lambda rows: None)
            for number, (encoder, tokens) in enumerate(zip(self.encoders, read, strict=True))
        ]
        if len(parts) == 1:
            return parts[0].to(torch.float16).cpu().numpy()
        return (torch.cat(parts, dim=1) / len(parts) ** 0.5).to(torch.float16).cpu().numpy()


class _Encoder:
    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        amp: torch.dtype | None,
        tokens_per_batch: int,
        place: dict[str, Any],
    ) -> None:
        self.model = load_model(config, device, amp, **place)
        self.device = device
        self.amp = amp
        self.prompt = prompt_of(self.model, config)
        self.tokens_per_batch = tokens_per_batch
        with torch.inference_mode():
            self._flops_linear, self._flops_square = self._count_flops()

    def read(self, sentences: Sequence[str]) -> Tokens | list[str]:
        return tokenise(self.model, sentences, self.prompt) if can_tokenise(self.model) else list(sentences)

    @torch.inference_mode()
    def encode(self, read: Tokens | list[str], work: Work, number: int, tick: Callable[[int], object]) -> torch.Tensor:
        """float32 [n, d] on the device, L2-normalised. Where the weights are spread over ranks, each encodes every W-th batch;
        a forward pass is a collective then, so all make equally many."""
        if not isinstance(read, Tokens):
            return self._encode_sentences(read, tick)
        batches = list(cut(read.lengths, self.tokens_per_batch, self.model.max_seq_length))
        mine = batches[rank() :: world_size()]
        rows, vectors = [], []
        for step in range(-(-len(batches) // world_size())):
            batch = mine[step] if step < len(mine) else batches[-1]
            encoded = self._forward(pad(self.model, read, batch))
            if step < len(mine):
                work.shapes.add((number, len(batch.rows), batch.width))
                work.flops += round(len(batch.rows) * (self._flops_linear + self._flops_square * batch.width) * batch.width)
                work.tokens += int(read.lengths[batch.rows].sum())
                work.padded += batch.rows.size * batch.width
                rows.append(batch.rows)
                vectors.append(encoded)
            tick(sum(len(batch.rows) for batch in batches[step * world_size() : (step + 1) * world_size()]))
        if not mine:
            return add_over_ranks(encoded.new_zeros((len(read.lengths), encoded.shape[1])))
        return add_over_ranks(_in_order(vectors, rows, len(read.lengths)))

    def _encode_sentences(self, sentences: list[str], tick: Callable[[int], object]) -> torch.Tensor:
        order = np.array(sorted(range(len(sentences)), key=lambda row: -len(sentences[row])))
        rows = np.array_split(order, range(SENTENCES_PER_BATCH, len(order), SENTENCES_PER_BATCH))
        vectors = []
        for chosen in rows:
            features = self.model.preprocess([sentences[row] for row in chosen], prompt=self.prompt or None)
            vectors.append(self._forward(features))
            tick(len(chosen))
        return _in_order(vectors, rows, len(order))

    def _count_flops(self) -> tuple[float, float]:
        """(a, b): a sentence of w tokens takes a w + b w^2 operations (2 x multiply-adds), from two forward passes."""
        tokens, counts = self.read(["what does it take"]), []
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
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            vectors = self.model(features)["sentence_embedding"]
        return torch.nn.functional.normalize(vectors.float(), dim=-1)


def prompt_of(model: SentenceTransformer, config: ModelConfig) -> str:
    """The text put before every sentence: `prompt`, or the model's own of the name `prompt_name`, or its default.

    Raises ValueError for a name that the model does not know.
    """
    if config.prompt is not None:
        return config.prompt
    name = config.prompt_name or model.default_prompt_name
    if name is None:
        return ""
    if name not in model.prompts:
        raise ValueError(f"teacher.prompt_name {name!r}: {config.model} has the prompts {sorted(model.prompts)}")
    return model.prompts[name] or ""


def _in_order(vectors: list[torch.Tensor], rows: Sequence[np.ndarray], total: int) -> torch.Tensor:
    """Vectors of batches put back to the rows they came from; zeros [total, d] elsewhere."""
    joined = torch.cat(vectors)
    ordered = joined.new_zeros((total, joined.shape[1]))
    ordered[torch.from_numpy(np.concatenate(rows)).to(joined.device)] = joined
    return ordered
