"""Student: tokens to sentence vectors.

    z = pool(encoder(tokens))            [B, d_s]
    z = head(z)                          [B, dim], after HPD: Linear + Tanh, or Linear

On disk a student is an ordinary transformers folder with two files beside it: student.json (pooling, length, head) and
heads.safetensors (the head, and what training needs again: the projection to the teacher's width and logit_scale).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill.student.encoder import load_encoder, save_encoder
from distill.student.pooling import NEEDS_HIDDEN_STATES, pool, pooled_width

Tokens = dict[str, Tensor]
PAD_TO = 4  # few distinct lengths: kernels are chosen once a shape


class Student(nn.Module):
    """An encoder with its pooling and, after HPD, its head. `forward` gives vectors that are not yet normalised."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str,
        max_length: int,
        head: nn.Sequential | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_length = min(max_length, _longest_input(encoder))
        self.head = head

    @property
    def width(self) -> int:
        """d_s, before the head."""
        config = self.encoder.config
        hidden_size = int(getattr(config, "hidden_size", 0) or config.d_model)
        return pooled_width(self.pooling, hidden_size, int(getattr(config, "num_hidden_layers", 0) or config.num_layers))

    @property
    def dim(self) -> int:
        """The width of what `forward` returns."""
        return self.width if self.head is None else int(self.head[0].out_features)  # type: ignore[arg-type]

    def add_head(self, dim: int, activation: str, seed: int) -> None:
        """A compact head, Linear(d_s -> dim) with or without Tanh."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            linear = nn.Linear(self.width, dim)
        self.head = nn.Sequential(linear, nn.Tanh()) if activation == "tanh" else nn.Sequential(linear)

    def tokenize(self, sentences: Sequence[str]) -> Tokens:
        """input_ids and attention_mask [B, L], int64: at most max_length tokens, padded on the right."""
        return self.pad(self.token_ids(sentences))

    def token_ids(self, sentences: Sequence[str]) -> list[list[int]]:
        """Each sentence's tokens, at most max_length of them."""
        fast = self.tokenizer.backend_tokenizer  # which makes nothing but ids of it, in half the time
        fast.no_padding()
        fast.enable_truncation(self.max_length)
        return [encoding.ids for encoding in fast.encode_batch_fast(list(sentences))]

    def pad(self, token_ids: Sequence[list[int]]) -> Tokens:
        """What `tokenize` returns. L is a multiple of 4, or the encoder's last position."""
        lengths = np.array([len(ids) for ids in token_ids])
        width = min(-(-int(lengths.max()) // PAD_TO) * PAD_TO, _longest_input(self.encoder))
        is_real = np.arange(width) < lengths[:, None]
        ids = np.full(is_real.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        ids[is_real] = np.concatenate(token_ids)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(is_real.astype(np.int64))}

    def forward(self, *chunks: Tokens) -> Tensor:
        """Chunks of tokens, [B_c, L_c] each and padded on the right, to [B, dim] float32 vectors of all their rows, in order.

        Tokens of all chunks are looked up at once: the backward pass of a lookup writes the whole table. Chunks of vectors,
        [B_c, d_s] each, are what a frozen encoder has made of their tokens before, and go to the head as they are.
        """
        if "vectors" in chunks[0]:
            return self._headed(torch.cat([chunk["vectors"] for chunk in chunks]))
        lookup = self.encoder.get_input_embeddings()
        embedded_td = lookup(torch.cat([chunk["input_ids"].flatten() for chunk in chunks]))
        parts = embedded_td.split([chunk["input_ids"].numel() for chunk in chunks])
        vectors = [
            self._pooled(part.view(*chunk["input_ids"].shape, -1), chunk["attention_mask"])
            for part, chunk in zip(parts, chunks, strict=True)
        ]
        return self._headed(torch.cat(vectors))

    def _headed(self, vectors_bd: Tensor) -> Tensor:
        return vectors_bd if self.head is None else self.head(vectors_bd)

    def _pooled(self, embedded_bld: Tensor, attention_mask_bl: Tensor) -> Tensor:
        output = self.encoder(
            inputs_embeds=embedded_bld,
            attention_mask=attention_mask_bl,
            output_hidden_states=self.pooling in NEEDS_HIDDEN_STATES,
        )
        return pool(self.pooling, output, attention_mask_bl)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str], batch_size: int = 64, *, normalize: bool = True) -> np.ndarray:
        """Vectors [n, dim] float32 of sentences, L2-normalised or as they are, in their order; on the encoder's device."""
        device = next(self.parameters()).device
        order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), i))
        vectors = np.zeros((len(sentences), self.dim), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = {name: value.to(device) for name, value in self.tokenize([sentences[i] for i in rows]).items()}
            encoded = self(tokens).float()
            vectors[rows] = (nn.functional.normalize(encoded, dim=-1) if normalize else encoded).cpu().numpy()
        return vectors

    def save(self, folder: Path, state: dict[str, Tensor], extra: dict[str, Tensor] | None = None) -> None:
        """Writes the folder from a whole `state` dict of this module (under ZeRO-3 the module itself holds only shards)."""
        encoder_state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        save_encoder(self.encoder, self.tokenizer, encoder_state, folder)
        heads = {k: v.contiguous() for k, v in state.items() if k.startswith("head.")} | dict(extra or {})
        if heads:
            save_file(heads, folder / "heads.safetensors")
        activation = None if self.head is None else ("tanh" if len(self.head) > 1 else "linear")
        description = {"pooling": self.pooling, "max_length": self.max_length, "head": activation, "dim": self.dim}
        (folder / "student.json").write_text(json.dumps(description, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Student:
        """The student that `save` wrote. Raises ValueError if the folder holds none."""
        if not (folder / "student.json").is_file():
            raise ValueError(f"no student at {folder}: it has no student.json; run the stage that trains it first")
        description: dict[str, Any] = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        encoder = load_encoder(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        student = cls(encoder, tokenizer, pooling=description["pooling"], max_length=description["max_length"])
        if description["head"] is not None:
            student.add_head(description["dim"], description["head"], seed=0)
            assert student.head is not None
            heads = load_file(folder / "heads.safetensors")
            student.head.load_state_dict({k.removeprefix("head."): v for k, v in heads.items() if k.startswith("head.")})
        return student


class TeacherSpace(nn.Module):
    """A student of CKD and the projection it was trained with: questions in the space of the teacher's stored vectors.

    Documents that the teacher has embedded are searched by the student's questions, without being embedded again.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if there is no student in `folder`."""
        super().__init__()
        self.student = Student.load(folder).eval()
        self.projection = load_projection(folder) or nn.Identity()

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """[n, d_t] float32, L2-normalised."""
        vectors = torch.from_numpy(self.student.encode(sentences, normalize=False))
        return nn.functional.normalize(self.projection(vectors).float(), dim=-1).numpy()


def load_extra(folder: Path) -> dict[str, Tensor]:
    """What training kept beside a student: projection.weight, projection.bias, logit_scale; empty if nothing."""
    path = folder / "heads.safetensors"
    return {k: v for k, v in load_file(path).items() if not k.startswith("head.")} if path.is_file() else {}


def load_projection(folder: Path) -> nn.Linear | None:
    """The projection [d_s -> d_t] that CKD trained with the student in `folder`, or None if there is none beside it."""
    kept = load_extra(folder)
    if "projection.weight" not in kept:
        return None
    width, teacher_dim = reversed(kept["projection.weight"].shape)
    projection = nn.Linear(width, teacher_dim)
    projection.load_state_dict({"weight": kept["projection.weight"], "bias": kept["projection.bias"]})
    return projection


def _longest_input(encoder: PreTrainedModel) -> int:
    """Positions the encoder has; RoBERTa and MPNet count theirs from the padding index."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is None:
        return 1 << 20
    offset = (
        (encoder.config.pad_token_id or 0) + 1
        if encoder.config.model_type in {"roberta", "xlm-roberta", "mpnet", "camembert"}
        else 0
    )
    return int(positions) - offset
