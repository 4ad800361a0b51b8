"""Student: tokens to text vectors.

    z = dense(pool(encoder(tokens)))     [B, d_s], without dense layers unless the initial model has some
    z = head(z)                          [B, dim], after HPD: Linear + Tanh, or Linear

On disk a student is an ordinary transformers folder with two files beside it: student.json (pooling, length, prompts) and
heads.safetensors (dense layers, head, and what training loads again: the projection to the teacher's width and logit_scale).
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
from distill.run.prompts import Role, role_prompt
from distill.student.encoder import hidden_size, load_encoder, longest_input, save_encoder, set_padding_side
from distill.student.pooling import NEEDS_HIDDEN_STATES, pool, pooled_width
from distill.student.settings import ModelSettings, module_config, new_module

Tokens = dict[str, Tensor]  # input_ids, attention_mask and, where a prompt is not pooled, pooling_mask, [B, L] int64 each
PAD_TO = 4  # few distinct lengths: kernels are chosen once per shape


class PooledVectors(NamedTuple):
    """Precomputed input of the head: the vectors [B, d_s] float32 that a frozen encoder gave, pooled, for B texts."""

    vectors: Tensor


Chunk = Tokens | PooledVectors


class Student(nn.Module):
    """An encoder with its pooling and, after HPD, its head. `forward` returns vectors that are not normalised.

    settings: what is preserved of the initial model's folder; its pooling and length may be replaced by `pooling` and
    `max_length`. is_aligned: whether ckd trained its vectors, without a projection, to equal the teacher's.
    embeds_tokens_first: whether the encoder is given embedded tokens, or their ids.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str,
        max_length: int,
        settings: ModelSettings | None = None,
        head: nn.Sequential | None = None,
    ) -> None:
        """Raises ValueError if the first dense layer does not have the width that is pooled."""
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_length = min(max_length, longest_input(encoder.config))
        self.settings = settings or ModelSettings()
        self.dense = nn.ModuleList(self.settings.dense)
        self.head = head
        self.is_aligned = False
        self.embeds_tokens_first = True
        num_layers = int(getattr(encoder.config, "num_hidden_layers", 0) or encoder.config.num_layers)
        pooled = pooled_width(pooling, hidden_size(encoder.config), num_layers)
        self.full_width = self.settings.full_width(pooled)
        self.width = self.settings.width(pooled)  # d_s, before the head

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

    def prompt(self, role: Role | None = None) -> str:
        """What is put before a text of a role, or without one."""
        return role_prompt(self.settings.prompts, self.settings.default_prompt_name, role)

    def tokenize(self, texts: Sequence[str], roles: Sequence[Role | None] | None = None) -> Tokens:
        """input_ids and attention_mask [B, L], int64: at most max_length tokens, padded on the right."""
        return self.pad(self.token_ids(texts, roles))

    def token_ids(self, texts: Sequence[str], roles: Sequence[Role | None] | None = None) -> list[list[int]]:
        """The token ids of each text with the prompt of its role, at most max_length of them. May be called from several
        threads. roles: one a text; None: no text has a role.

        Of a prompt that the pooling leaves out, an id i is -1 - i.
        """
        ids: list[list[int]] = [encoding.ids for encoding in self._encodings(texts, roles)]
        if not self.settings.include_prompt:
            skipped = {role: self._unpooled(role) for role in set(roles or [None])}
            counts = [skipped[role] for role in roles or [None] * len(ids)]
            ids = [[-1 - token for token in each[:n]] + each[n:] for each, n in zip(ids, counts, strict=True)]
        return ids

    def is_truncated(self, texts: Sequence[str], roles: Sequence[Role | None] | None = None) -> np.ndarray:
        """bool [n], whether a text is longer than max_length tokens, with its prompt."""
        return np.array([bool(encoding.overflowing) for encoding in self._encodings(texts, roles)], bool)

    def characters_read(self, texts: Sequence[str], roles: Sequence[Role | None]) -> np.ndarray:
        """int64 [n], how many characters of each text its tokens cover, of which max_length are read."""
        prompts = [self.prompt(role) for role in roles]
        encodings = self._fast_tokenizer.encode_batch([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return characters_covered(encodings, [len(prompt) for prompt in prompts])

    def _encodings(self, texts: Sequence[str], roles: Sequence[Role | None] | None) -> list[Any]:
        prompts = {role: self.prompt(role) for role in set(roles or [None])}
        prompted = list(texts)
        if any(prompts.values()):
            prompted = [prompts[role] + text for role, text in zip(roles or [None] * len(texts), texts, strict=True)]
        encodings: list[Any] = self._fast_tokenizer.encode_batch_fast(prompted)  # half the time of `self.tokenizer(texts)`
        return encodings

    def _unpooled(self, role: Role | None) -> int:
        """The number of a prompt's tokens that the pooling leaves out, with the special tokens before them."""
        if not (prompt := self.prompt(role)):
            return 0
        ids = self._fast_tokenizer.encode(prompt).ids
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    @cached_property
    def _fast_tokenizer(self) -> Any:
        """Configured once: it is called from two threads."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
        return backend

    def pad(self, token_ids: Sequence[list[int]]) -> Tokens:
        """The tokens of texts with these ids, padded on the right. L is a multiple of 4, or the encoder's last position."""
        lengths = np.array([len(ids) for ids in token_ids])
        width = min(-(-int(lengths.max()) // PAD_TO) * PAD_TO, longest_input(self.encoder.config))
        is_real = np.arange(width) < lengths[:, None]
        ids = np.full(is_real.shape, self.tokenizer.pad_token_id, dtype=np.int64)
        ids[is_real] = np.concatenate(token_ids)
        tokens = {"attention_mask": torch.from_numpy(is_real.astype(np.int64))}
        if (is_skipped := ids < 0).any():
            ids = np.where(is_skipped, -1 - ids, ids)
            tokens["pooling_mask"] = torch.from_numpy((is_real & ~is_skipped).astype(np.int64))
        return {"input_ids": torch.from_numpy(ids), **tokens}

    def forward(self, *chunks: Chunk) -> Tensor:
        """[B, dim] float32 vectors of the rows of all chunks, in order.

        A chunk is tokens, [B_c, L_c] and padded on the right, or vectors, [B_c, d_s]; all chunks of a call are of one kind.
        """
        vectors = [chunk.vectors for chunk in chunks if isinstance(chunk, PooledVectors)]
        vectors_bd = torch.cat(vectors or self._pooled_chunks([chunk for chunk in chunks if isinstance(chunk, dict)]))
        return vectors_bd if self.head is None else self.head(vectors_bd)

    def _pooled_chunks(self, chunks: Sequence[Tokens]) -> list[Tensor]:
        """Tokens of all chunks are looked up at once, since the backward pass of a lookup writes the whole table."""
        if not self.embeds_tokens_first:
            return [self._pooled(chunk["input_ids"], chunk["attention_mask"], chunk.get("pooling_mask")) for chunk in chunks]
        lookup = self.encoder.get_input_embeddings()
        embedded_td = lookup(torch.cat([chunk["input_ids"].flatten() for chunk in chunks]))
        parts = embedded_td.split([chunk["input_ids"].numel() for chunk in chunks])
        return [
            self._pooled(part.view(*chunk["input_ids"].shape, -1), chunk["attention_mask"], chunk.get("pooling_mask"))
            for part, chunk in zip(parts, chunks, strict=True)
        ]

    def _pooled(self, tokens: Tensor, attention_mask_bl: Tensor, pooling_mask_bl: Tensor | None) -> Tensor:
        return self.pooled(self.encoder_output(tokens, attention_mask_bl), attention_mask_bl, pooling_mask_bl)

    def pooled(self, output: Any, attention_mask_bl: Tensor, pooling_mask_bl: Tensor | None = None) -> Tensor:
        """[B, d_s] float32, before the head, of what the encoder gave."""
        vectors_bd = pool(self.pooling, output, attention_mask_bl, pooling_mask_bl)
        for module in self.dense:
            vectors_bd = module({"sentence_embedding": vectors_bd})["sentence_embedding"].float()
        return vectors_bd[:, : self.settings.truncate_dim]

    def encoder_output(self, tokens: Tensor, attention_mask_bl: Tensor) -> Any:
        """What the encoder gives for tokens, embedded [B, L, d] or as ids [B, L], and their mask; `pooled` takes it."""
        return self.encoder(
            **{"input_ids" if tokens.ndim == 2 else "inputs_embeds": tokens},
            attention_mask=attention_mask_bl,
            output_hidden_states=self.pooling in NEEDS_HIDDEN_STATES,
        )

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 64,
        *,
        normalize: bool = True,
        roles: Sequence[Role | None] | None = None,
    ) -> np.ndarray:
        """Vectors [n, dim] float32 of n texts and their roles, in their order, L2-normalised if `normalize`."""
        device = next(self.parameters()).device
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            its_roles = None if roles is None else [roles[i] for i in rows]
            read = self.tokenize([texts[i] for i in rows], its_roles)
            tokens = {name: value.to(device) for name, value in read.items()}
            encoded = self(tokens).float()
            vectors[rows] = (nn.functional.normalize(encoded, dim=-1) if normalize else encoded).cpu().numpy()
        return vectors

    def save(self, folder: Path, state: dict[str, Tensor], extra: dict[str, Tensor] | None = None) -> None:
        """Writes the folder from a whole `state` dict of this module (under ZeRO-3 the module itself holds only shards)."""
        encoder_state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        save_encoder(self.encoder, self.tokenizer, encoder_state, folder)
        heads = {k: v.contiguous() for k, v in state.items() if k.startswith(("head.", "dense."))} | dict(extra or {})
        if heads:
            save_file(heads, folder / "heads.safetensors")
        activation = None if self.head is None else ("tanh" if len(self.head) > 1 else "linear")
        description = {
            "pooling": self.pooling,
            "max_length": self.max_length,
            "head": activation,
            "dim": self.dim,
            "is_aligned": self.is_aligned,
            "embeds_tokens_first": self.embeds_tokens_first,
            "prompts": dict(self.settings.prompts),
            "default_prompt_name": self.settings.default_prompt_name,
            "include_prompt": self.settings.include_prompt,
            "truncate_dim": self.settings.truncate_dim,
            "dense": [module_config(module) for module in self.dense],
        }
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
        set_padding_side(tokenizer, encoder.config)
        preserved = ModelSettings(  # absent, as what follows: of an earlier version, which had none of it
            include_prompt=description.get("include_prompt", True),
            dense=tuple(new_module(each) for each in description.get("dense", [])),
            prompts=description.get("prompts", {}),
            default_prompt_name=description.get("default_prompt_name"),
            truncate_dim=description.get("truncate_dim"),
        )
        sizes = {"pooling": description["pooling"], "max_length": description["max_length"]}
        student = cls(encoder, tokenizer, **sizes, settings=preserved)
        student.is_aligned = description.get("is_aligned", False)
        student.embeds_tokens_first = description.get("embeds_tokens_first", True)
        if description["head"] is not None:
            student.add_head(description["dim"], description["head"], seed=0)
        for name in ("dense", "head"):
            if (module := getattr(student, name)) is not None and list(module.parameters()):
                heads = load_file(folder / "heads.safetensors")
                module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in heads.items() if k.startswith(f"{name}.")})
        return student


def characters_covered(encodings: Sequence[Any], skipped: Sequence[int]) -> np.ndarray:
    """int64 [n], how many characters the tokens of each encoding cover (of `tokenizers`, with offsets), without its first
    `skipped` ones."""
    spans = [
        [(max(start, prompt), end) for start, end in encoding.offsets if end > prompt]
        for encoding, prompt in zip(encodings, skipped, strict=True)
    ]
    return np.array([max(span)[1] - min(span)[0] if span else 0 for span in spans], np.int64)


def student_in_teacher_space(folder: Path) -> Student | None:
    """The student in `folder` with CKD's projection as its head: it encodes queries in the space of the teacher's vectors, so
    that documents which the teacher embedded can be searched as they are.

    None if it was not trained towards the teacher's own vectors, or a later stage has dropped that. Raises ValueError if the
    folder holds no student.
    """
    student, projection = Student.load(folder).eval(), load_projection(folder)
    if student.head is not None or (projection is None and not student.is_aligned):
        return None
    student.head = None if projection is None else nn.Sequential(projection)
    return student


def load_extra(folder: Path) -> dict[str, Tensor]:
    """Tensors that training saved with a student: projection.weight, projection.bias, logit_scale; may be empty."""
    path = folder / "heads.safetensors"
    return {k: v for k, v in load_file(path).items() if not k.startswith(("head.", "dense."))} if path.is_file() else {}


def load_projection(folder: Path) -> nn.Linear | None:
    """The projection [d_s -> d_t] that CKD trained with the student in `folder`, or None if none was saved."""
    kept = load_extra(folder)
    if "projection.weight" not in kept:
        return None
    width, teacher_dim = reversed(kept["projection.weight"].shape)
    projection = nn.Linear(width, teacher_dim)
    projection.load_state_dict({"weight": kept["projection.weight"], "bias": kept["projection.bias"]})
    return projection
