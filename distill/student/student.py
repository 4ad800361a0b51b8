"""Student: tokens to text vectors.

    z = pool(encoder(tokens))            [B, d_s]
    z = head(z)                          [B, dim], after HPD: Linear + Tanh, or Linear

On disk a student is an ordinary transformers folder with two files beside it: student.json (pooling, length, head) and
heads.safetensors (the head, and what training loads again: the projection to the teacher's width and logit_scale).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill.run.model_folders import apply_umask
from distill.student.encoder import load_encoder, longest_input, save_encoder
from distill.student.pooling import NEEDS_HIDDEN_STATES, pool, pooled_width

Tokens = dict[str, Tensor]  # input_ids and attention_mask, [B, L] int64 each
PAD_TO = 4  # few distinct lengths: kernels are chosen once per shape


class PooledVectors(NamedTuple):
    """Precomputed input of the head: the vectors [B, d_s] float32 that a frozen encoder gave, pooled, for B texts."""

    vectors: Tensor


Chunk = Tokens | PooledVectors


class Student(nn.Module):
    """An encoder with its pooling and, after HPD, its head. `forward` returns vectors that are not normalised.

    is_aligned: whether ckd trained its vectors, without a projection, to equal the teacher's.
    """

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
        self.max_length = min(max_length, longest_input(encoder.config))
        self.head = head
        self.is_aligned = False

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

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """input_ids and attention_mask [B, L], int64: at most max_length tokens, padded on the right."""
        return self.pad(self.token_ids(texts))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, at most max_length of them. May be called from several threads."""
        encodings = self._fast_tokenizer.encode_batch_fast(list(texts))  # half the time of `self.tokenizer(texts)`
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _fast_tokenizer(self) -> Any:
        """Configured once: it is called from two threads."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self.max_length)
        return backend

    def pad(self, token_ids: Sequence[list[int]]) -> Tokens:
        """The tokens of texts with these ids, padded on the right. L is a multiple of 4, or the encoder's last position."""
        lengths = np.array([len(ids) for ids in token_ids])
        width = min(-(-int(lengths.max()) // PAD_TO) * PAD_TO, longest_input(self.encoder.config))
        is_real = np.arange(width) < lengths[:, None]
        ids = np.full(is_real.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        ids[is_real] = np.concatenate(token_ids)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(is_real.astype(np.int64))}

    def forward(self, *chunks: Chunk) -> Tensor:
        """[B, dim] float32 vectors of the rows of all chunks, in order.

        A chunk is tokens, [B_c, L_c] and padded on the right, or vectors, [B_c, d_s]; all chunks of a call are of one kind.
        """
        vectors = [chunk.vectors for chunk in chunks if isinstance(chunk, PooledVectors)]
        vectors_bd = torch.cat(vectors or self._pooled_chunks([chunk for chunk in chunks if isinstance(chunk, dict)]))
        return vectors_bd if self.head is None else self.head(vectors_bd)

    def _pooled_chunks(self, chunks: Sequence[Tokens]) -> list[Tensor]:
        """Tokens of all chunks are looked up at once, since the backward pass of a lookup writes the whole table."""
        lookup = self.encoder.get_input_embeddings()
        embedded_td = lookup(torch.cat([chunk["input_ids"].flatten() for chunk in chunks]))
        parts = embedded_td.split([chunk["input_ids"].numel() for chunk in chunks])
        return [
            self._pooled(part.view(*chunk["input_ids"].shape, -1), chunk["attention_mask"])
            for part, chunk in zip(parts, chunks, strict=True)
        ]

    def _pooled(self, embedded_bld: Tensor, attention_mask_bl: Tensor) -> Tensor:
        return pool(self.pooling, self.encoder_output(embedded_bld, attention_mask_bl), attention_mask_bl)

    def encoder_output(self, embedded_bld: Tensor, attention_mask_bl: Tensor) -> Any:
        """What the encoder gives for embedded tokens [B, L, d] and their mask [B, L]; `pool` takes it."""
        return self.encoder(
            inputs_embeds=embedded_bld,
            attention_mask=attention_mask_bl,
            output_hidden_states=self.pooling in NEEDS_HIDDEN_STATES,
        )

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 64, *, normalize: bool = True) -> np.ndarray:
        """Vectors [n, dim] float32 of n texts, in their order, L2-normalised if `normalize`."""
        device = next(self.parameters()).device
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = {name: value.to(device) for name, value in self.tokenize([texts[i] for i in rows]).items()}
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
        description["is_aligned"] = self.is_aligned
        (folder / "student.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        apply_umask(folder)

    @classmethod
    def load(cls, folder: Path) -> Student:
        """The student that `save` wrote. Raises ValueError if the folder holds none."""
        if not (folder / "student.json").is_file():
            raise ValueError(f"no student at {folder}: it has no student.json; run the stage that trains it first")
        description: dict[str, Any] = json.loads((folder / "student.json").read_text(encoding="utf-8"))
        encoder = load_encoder(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        student = cls(encoder, tokenizer, pooling=description["pooling"], max_length=description["max_length"])
        student.is_aligned = description.get("is_aligned", False)  # absent: an earlier version's, whose vectors may be anything
        if description["head"] is not None:
            student.add_head(description["dim"], description["head"], seed=0)
            assert student.head is not None
            heads = load_file(folder / "heads.safetensors")
            student.head.load_state_dict({k.removeprefix("head."): v for k, v in heads.items() if k.startswith("head.")})
        return student


class TeacherSpace(nn.Module):
    """A student of CKD with the projection it was trained with: encodes queries in the space of the teacher's vectors.

    Documents that the teacher embedded can be searched with the student's queries without being embedded again.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if there is no student in `folder`."""
        super().__init__()
        self.student = Student.load(folder).eval()
        self.projection = load_projection(folder) or nn.Identity()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[n, d_t] float32, L2-normalised."""
        vectors = torch.from_numpy(self.student.encode(texts, normalize=False))
        return nn.functional.normalize(self.projection(vectors).float(), dim=-1).numpy()


def load_extra(folder: Path) -> dict[str, Tensor]:
    """Tensors that training saved with a student: projection.weight, projection.bias, logit_scale; may be empty."""
    path = folder / "heads.safetensors"
    return {k: v for k, v in load_file(path).items() if not k.startswith("head.")} if path.is_file() else {}


def load_projection(folder: Path) -> nn.Linear | None:
    """The projection [d_s -> d_t] that CKD trained with the student in `folder`, or None if none was saved."""
    kept = load_extra(folder)
    if "projection.weight" not in kept:
        return None
    width, teacher_dim = reversed(kept["projection.weight"].shape)
    projection = nn.Linear(width, teacher_dim)
    projection.load_state_dict({"weight": kept["projection.weight"], "bias": kept["projection.bias"]})
    return projection
