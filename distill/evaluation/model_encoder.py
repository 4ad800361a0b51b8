"""Any sentence-transformers model as a function from texts to vectors, on one rank or all, and its speed."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from distill.metrics.vectors import Encode, EncodedTexts, RoleEncode, RoleText, encode_by_role
from distill.run.collectives import from_rank_0, gather_rows, rank, world_size
from distill.run.hub import is_hub_reachable
from distill.run.model_folders import resolve_model
from distill.run.prompts import Role
from distill.student.encoder import check_weights_complete, set_pad_token
from distill.student.initial import build_student
from distill.student.student_config import StudentConfig

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
TEXTS_PER_BLOCK = 16_384  # gathered at once


class TextEncoder(Protocol):
    """Texts to float32 [n, dim] vectors, a RoleEncode. params: number of parameters; dtype: that it runs in."""

    @property
    def dim(self) -> int: ...

    @property
    def params(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    def __call__(self, texts: Sequence[str], role: Role | None = None, /) -> np.ndarray: ...


class ModelEncoder:
    """A loaded model as a TextEncoder; dim is that after its `truncate_dim`."""

    def __init__(self, model: SentenceTransformer, *, batch_size: int = 64, progress: bool = False) -> None:
        self.model = model
        self.batch_size = batch_size
        self.progress = progress
        self.params = sum(parameter.numel() for parameter in model.parameters())
        self.dtype = "+".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))
        self.dim = len(model.encode("width", show_progress_bar=False))

    def __call__(self, texts: Sequence[str], role: Role | None = None) -> np.ndarray:
        """Vectors float32 [n, dim] in the order given; a text that occurs twice is encoded once.

        role: query or document takes the prompt that `encode_query` or `encode_document` does, None the default prompt.
        Raises ValueError if the model gives a number that is not finite.
        """
        if not len(texts):
            return np.empty((0, self.dim), np.float32)
        vectors = EncodedTexts.of(lambda distinct: self._encode(distinct, role), texts)(texts)
        if not (is_finite := np.isfinite(vectors).all(axis=1)).all():
            raise ValueError(f"the model gives a vector that is not finite, first for {texts[int(is_finite.argmin())]!r}")
        return vectors

    def _encode(self, texts: list[str], role: Role | None) -> np.ndarray:
        model: Any = self.model
        encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[role]
        # sentence-transformers itself batches by length, longest first, and restores the order
        vectors = encode(texts, batch_size=self.batch_size, show_progress_bar=self.progress, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)


class StudentEncoder:
    """A student as it is before training, with all of its tokens, as a TextEncoder."""

    dtype = "float32"

    def __init__(self, config: StudentConfig, teacher: str | None, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.student = build_student(config, teacher, seed).to(device).eval()
        self.dim = self.student.dim
        self.params = sum(parameter.numel() for parameter in self.student.parameters())

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], role: Role | None = None, /) -> np.ndarray:
        return self.student.encode(texts, roles=[role] * len(texts))


def encoder_of(
    path_or_name: str | Path,
    *,
    batch_size: int = 64,
    device: str | None = None,
    truncate_dim: int | None = None,
    progress: bool = False,
) -> ModelEncoder:
    """Loads a folder, `package:NAME/FOLDER` or, where there is no such folder, a hub name; safetensors only, no remote code.

    device None takes the GPU where there is one. truncate_dim keeps the first dimensions of every vector; None keeps those that
    the model's own truncate_dim says, if it has one.
    Raises ValueError that says what is missing, before anything is loaded where that can be known.
    """
    name = resolve_model(str(path_or_name))
    if truncate_dim is not None and truncate_dim < 1:
        raise ValueError(f"truncate_dim {truncate_dim} is not a number of dimensions; it must be 1 or more")
    _check_device(device)
    options: dict[str, Any] = {"device": device, "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    model = _load(name, options)
    if truncate_dim is not None:
        with model.truncate_embeddings(None):
            width = model.get_embedding_dimension()
        if width is not None and truncate_dim > width:
            raise ValueError(f"truncate_dim {truncate_dim} is more than the {width} dimensions of {path_or_name}")
        model.truncate_dim = truncate_dim
    warn_of_unused_prompt(model, path_or_name)
    return ModelEncoder(model, batch_size=batch_size, progress=progress)


def warn_of_unused_prompt(model: SentenceTransformer, name: str | Path | None) -> None:
    """Warns if a model names its documents' prompt so that sentence-transformers' encode_document does not take it."""
    unused = next((prompt for prompt in ("passage", "corpus") if model.prompts.get(prompt)), None)
    if unused is not None and not model.prompts.get("document"):
        logger.warning(
            "%s: its prompt %r is not put before documents, since sentence-transformers takes the prompt 'document': give it"
            " that name too, in config_sentence_transformers.json",
            name,
            unused,
        )


def encode_over_ranks(encode: RoleEncode, texts: Sequence[RoleText], device: torch.device) -> np.ndarray | None:
    """Rank 0's vectors float32 [n, d] of its `texts`, in their order; None on the others, whose `texts` are not read.

    Rank r of W encodes every W-th text from r on. Vectors are gathered block by block on `device`, which is the process
    group's, so that the others never hold more than a block. All ranks call it, with the same model.
    """
    num_texts = from_rank_0(len(texts) if rank() == 0 else None, device)
    gathered = []
    for start in range(0, num_texts, TEXTS_PER_BLOCK):
        block = from_rank_0(list(texts[start : start + TEXTS_PER_BLOCK]) if rank() == 0 else None, device)
        mine = [(role, text) for role, text in block[rank() :: world_size()]]
        own = torch.from_numpy(encode_by_role(encode, mine)).to(device)
        vectors = gather_rows(own, len(block))
        if rank() == 0:
            gathered.append(vectors.cpu().numpy())
    return np.concatenate(gathered) if rank() == 0 else None


def work_over_ranks(encode: RoleEncode, device: torch.device, work: Callable[[RoleEncode], Result]) -> Result | None:
    """What `work` returns on rank 0, which is given an encoder that all ranks share; None on the others.

    The others encode their parts until it returns; where it raises, they fail in the collective that they wait in.
    """
    if rank() > 0:
        while from_rank_0(None, device):
            encode_over_ranks(encode, [], device)
        return None

    def shared(texts: Sequence[str], role: Role | None = None, /) -> np.ndarray:
        from_rank_0(True, device)
        vectors = encode_over_ranks(encode, [(role, text) for text in texts], device)
        assert vectors is not None
        return vectors

    result = work(shared)
    from_rank_0(False, device)
    return result


def throughput(encode: Encode, texts: Sequence[str], seconds: float = 3.0) -> float:
    """Texts per second, over distinct texts in slices of 256, for at least `seconds` after one warm-up slice."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        raise ValueError("throughput needs at least one text")
    slices = [distinct[start : start + 256] for start in range(0, len(distinct), 256)]
    encode(slices[0])
    num_encoded, start = 0, time.perf_counter()
    for part in itertools.cycle(slices):
        encode(part)
        num_encoded += len(part)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            break
    return num_encoded / elapsed


def _check_device(device: str | None) -> None:
    try:
        kind = torch.device(device).type if device else "cpu"
    except RuntimeError:
        raise ValueError(f"{device!r} is not a device; name cpu, cuda, cuda:1, ... or none for the default") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} is requested, but there is no GPU that this torch can use")


def _load(name: str, options: dict[str, Any]) -> SentenceTransformer:
    is_folder = Path(name).is_dir()
    is_reachable = not is_folder and is_hub_reachable()
    try:
        model = SentenceTransformer(name, local_files_only=not is_reachable, **options)
        check_weights_complete(name, local_files_only=True)
        if isinstance(model[0], Transformer):
            set_pad_token(model.tokenizer)
        return model
    except (OSError, SafetensorError) as error:
        if is_folder:
            raise ValueError(f"the model at {name} does not load: {error}") from None
        why = "the hub cannot be reached, and its cache here has no such model"
        if is_reachable:
            why = ": ".join(["the hub has no such model that loads", *str(error).splitlines()[:1]])
        raise ValueError(f"no model {name}: there is no such folder, and {why}") from None
