"""Sentences to vectors by the teacher: sorted by length, cut by a budget of padded tokens, back in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from distill.config import TeacherConfig
from distill.models import resolve_model
from distill.student.encoder import load_encoder

PAD_TO = 8  # few distinct lengths: kernels are chosen once a shape


def load_teacher(config: TeacherConfig, device: torch.device) -> SentenceTransformer:
    """The teacher in eval mode, from safetensors, never with remote code.

    A folder without modules.json is a plain encoder: `teacher.pooling` must say how it pools. Raises ValueError.
    """
    path = resolve_model(config.model or "")
    arguments: dict[str, Any] = {"model_kwargs": {"use_safetensors": True, "dtype": torch.float32}, "revision": config.revision}
    says_how = not Path(path).exists() or (Path(path) / "modules.json").exists()
    if says_how and config.pooling is None:
        model = SentenceTransformer(path, device=str(device), trust_remote_code=False, **arguments)
    elif config.pooling is None:
        raise ValueError(f"{path} is a plain encoder (no modules.json): say how it pools, teacher.pooling=cls|pooler|mean")
    else:
        model = SentenceTransformer(modules=_pooled(path, config), device=str(device))
    if config.max_length is not None:
        positions = getattr(getattr(model[0], "model", None), "config", None)
        most = getattr(positions, "max_position_embeddings", None)
        if most is not None and config.max_length > most:
            raise ValueError(f"teacher.max_length {config.max_length} is above the {most} positions of {path}")
        model.max_seq_length = config.max_length
    return model.eval()


def _pooled(path: str, config: TeacherConfig) -> list[torch.nn.Module]:
    arguments = {"use_safetensors": True, "dtype": torch.float32, "revision": config.revision}
    transformer = Transformer(path, model_kwargs=arguments, max_seq_length=config.max_length)
    width = transformer.get_embedding_dimension()
    if config.pooling != "pooler":
        return [transformer, Pooling(width, pooling_mode=config.pooling)]
    pooler: Any = load_encoder(path, revision=config.revision, needs_pooler=True).get_submodule("pooler")
    dense = Dense(
        width, width, activation_function=torch.nn.Tanh(), init_weight=pooler.dense.weight, init_bias=pooler.dense.bias
    )
    return [transformer, Pooling(width, pooling_mode="cls"), dense]


class TeacherEncoder:
    """encode(sentences) -> L2-normalised fp16 vectors [n, dim], in the sentences' order. amp: bfloat16 or None."""

    def __init__(self, config: TeacherConfig, device: torch.device, amp: torch.dtype | None) -> None:
        self.model = load_teacher(config, device)
        self.device = device
        self.amp = amp
        self.prompt = config.prompt
        self.tokens_per_batch = config.tokens_per_batch

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        prompted = [self.prompt + sentence for sentence in sentences]
        lengths = self._lengths(prompted)
        order = np.argsort(-lengths, kind="stable")
        batches: list[tuple[np.ndarray, torch.Tensor]] = []
        start = 0
        while start < len(order):
            padded = -(-int(lengths[order[start]]) // PAD_TO) * PAD_TO
            rows = order[start : start + max(1, self.tokens_per_batch // padded)]
            batches.append((rows, self._forward([prompted[row] for row in rows])))
            start += len(rows)
        vectors = np.zeros((len(sentences), batches[0][1].shape[1]), dtype=np.float16)
        for rows, encoded in batches:
            vectors[rows] = encoded.cpu().numpy()
        return vectors

    def _lengths(self, sentences: list[str]) -> np.ndarray:
        longest = self.model.max_seq_length or 1 << 20
        encodings = self.model.tokenizer(sentences, truncation=True, max_length=longest)["input_ids"]
        return np.array([len(ids) for ids in encodings])

    def _forward(self, sentences: list[str]) -> torch.Tensor:
        features = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in self.model.preprocess(sentences).items()
        }
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            vectors = self.model(features)["sentence_embedding"]
        return torch.nn.functional.normalize(vectors.float(), dim=-1).to(torch.float16)
