"""A smaller vocabulary for the initial student: the tokens that a text needs, and the rows of its embedding table alone.

    count_tokens -> TokenTable.select -> trim        ids ascending; new id = place in the list

Special tokens, the bytes of a tokenizer that falls back to them and the characters of the text are always kept, so that
unseen words still split into known tokens. A text whose tokens are all kept has the same tokens, and so the same vector:

    WordPiece    takes the longest token that fits, which is kept; but a word that the full one cannot split may now be split
    Unigram      the best segmentation stays the best of those that are left
    BPE          every merge that leads to a kept token is kept, with its parts: the merges of such a text are all there

The tokenizer is edited as the JSON of its tokenizers.Tokenizer, and saved and loaded as that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.run.files import read_json, write_json
from distill.run.prompts import Role
from distill.run.sampling import evenly_spread
from distill.student.encoder import FROM_PADDING, unlike_its_config
from distill.student.student import Student
from distill.student.student_config import VocabularyConfig

Int64 = NDArray[np.int64]
COUNTED_ROWS = 300_000
ROWS_PER_BLOCK = 8_192
MEASURED_ROWS = 2_000


class Rows(Protocol):
    """Texts by their number, as of a ShardReader."""

    def __len__(self) -> int: ...

    def texts(self, indices: Int64, /) -> list[str]: ...

    def roles(self, indices: Int64, /) -> list[Role | None]: ...


class TokenTable:
    """The tokens of a fast tokenizer, and what each needs.

    ids: token -> id. always: ids that are kept whatever the text is. unknown: the id of what the tokenizer cannot split, if it
    has one. Raises ValueError for a tokenizer that is none of WordPiece, BPE, Unigram.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        model = described["model"]
        if model["type"] not in ("WordPiece", "BPE", "Unigram"):
            raise ValueError(f"student.vocabulary: a {model['type']} tokenizer cannot be cut to fewer tokens; leave it out")
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self._tokens = {token_id: token for token, token_id in self.ids.items()}
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        self._parts = {} if model["type"] != "BPE" else parts_of_merges(model, self.ids)
        self._bytes = _byte_tokens(described)
        always = {added["id"] for added in described["added_tokens"] if added["special"]}
        always |= set(tokenizer.all_special_ids) | _ids_of_config(config)
        always |= {self.ids[token] for token in self._bytes & self.ids.keys()}
        self.unknown = model["unk_id"] if model["type"] == "Unigram" else self.ids.get(model.get("unk_token"))
        always |= set() if self.unknown is None else {self.unknown}
        if model["type"] == "Unigram":
            scores = [score for _, score in model["vocab"]]
            always.add(scores.index(min(scores)))  # that of an unknown character is relative to it
        self.always = self.closure(always & self._tokens.keys(), set())

    def __len__(self) -> int:
        return len(self._tokens)

    def closure(self, wanted: Iterable[int], kept: set[int]) -> set[int]:
        """`wanted` and every token that merges to them, by any way, but for those in `kept`, which is closed."""
        found: set[int] = set()
        open_ids = [token_id for token_id in wanted if token_id not in kept]
        while open_ids:
            token_id = open_ids.pop()
            if token_id not in found:
                found.add(token_id)
                open_ids += [part for part in self._parts.get(token_id, ()) if part not in kept]
        return found

    def characters(self, token_ids: Iterable[int]) -> set[int]:
        """The tokens of one character each, at the beginning of a word and inside one, that these tokens consist of."""
        texts = (self._tokens[token_id].removeprefix(self._prefix).removesuffix(self._suffix) for token_id in token_ids)
        found = {character for text in texts if text not in self._bytes for character in text}
        forms = {form for c in found for form in (c, self._prefix + c, c + self._suffix, self._prefix + c + self._suffix)}
        return {self.ids[form] for form in forms & self.ids.keys()}

    def select(self, counts: Mapping[int, int], size: int | None) -> list[int]:
        """The ids to keep, ascending: what is always kept, the characters of the counted tokens, then the counted tokens by
        falling count, of equal counts the lower id first, each with what it needs, up to the first that `size` has no room for.

        Raises ValueError if `size` has no room for what is always kept and for the characters.
        """
        ordinary = [token_id for token_id in counts if token_id not in self.always]
        kept = self.always | self.closure(self.characters(ordinary), self.always)
        self._check_size(len(kept), size)
        for token_id in sorted(ordinary, key=lambda token_id: (-counts[token_id], token_id)):
            needed = self.closure([token_id], kept)
            if size is not None and len(kept) + len(needed) > size:
                break
            kept |= needed
        return sorted(kept)

    def check(self, config: VocabularyConfig) -> None:
        """Raises ValueError for what of the config can be known to be wrong without the text."""
        self._check_size(len(self.always), config.size)
        if config.tokens is not None:
            self.read_tokens(Path(config.tokens))

    def read_tokens(self, path: Path) -> list[int]:
        """The ids of a file's tokens, one a line. Raises ValueError naming the line of one that the tokenizer does not have."""
        if not path.is_file():
            raise ValueError(f"student.vocabulary.tokens: no file at {path}")
        found = []
        for number, token in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if token and token not in self.ids:
                raise ValueError(f"student.vocabulary.tokens: {path}, line {number}: the tokenizer has no token {token!r}")
            found += [self.ids[token]] if token else []
        return found

    def _check_size(self, needed: int, size: int | None) -> None:
        if size is not None and size < needed:
            raise ValueError(
                f"student.vocabulary.size {size} is too small: special tokens and single characters alone are {needed}"
            )


def parts_of_merges(model: Mapping[str, Any], ids: Mapping[str, int]) -> dict[int, list[int]]:
    """Token -> the tokens that merge to it, of all merges that do, from the JSON of a BPE model."""
    parts: dict[int, list[int]] = {}
    for left, right in model["merges"]:
        parts.setdefault(ids[merged(left, right, model)], []).extend((ids[left], ids[right]))
    return parts


def merged(left: str, right: str, model: Mapping[str, Any]) -> str:
    """The token that a BPE model makes of two."""
    return left + right.removeprefix(model["continuing_subword_prefix"] or "")


def _byte_tokens(described: Mapping[str, Any]) -> frozenset[str]:
    """The tokens of single bytes that the tokenizer falls back to; empty for one that does not."""
    if described["model"].get("byte_fallback"):
        return frozenset(f"<0x{byte:02X}>" for byte in range(256))
    steps = [part for name in ("normalizer", "pre_tokenizer") for part in _parts_of(described[name])]
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    return frozenset(pre_tokenizers.ByteLevel.alphabet()) if is_byte_level else frozenset()


def _parts_of(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, those of a Sequence one by one."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
    for inner in next((step[name] for name in ("normalizers", "pretokenizers", "processors") if name in step), []):
        yield from _parts_of(inner)


def _ids_of_config(config: PretrainedConfig) -> set[int]:
    """The token ids that an encoder's config names, such as pad_token_id."""
    values = [value for name, value in config.to_dict().items() if name.endswith("token_id")]
    return {number for value in values for number in (value if isinstance(value, list) else [value]) if number is not None}


def count_tokens(student: Student, reader: Rows, limit: int = COUNTED_ROWS) -> Iterator[dict[int, int]]:
    """Token id -> how often it occurs in at most `limit` texts that are evenly spread over the set, with their prompts; yields
    what is counted so far after each block of texts, and so at last the whole."""
    rows = evenly_spread(len(reader), limit)
    counts: Int64 = np.zeros(0, np.int64)
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        found = np.bincount(_flat(student.token_ids(reader.texts(block), reader.roles(block))), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        yield {int(token_id): int(counts[token_id]) for token_id in np.flatnonzero(counts)}


def _flat(token_ids: Sequence[list[int]]) -> Int64:
    """All ids in a row; those of a prompt that is not pooled as well."""
    flat = np.concatenate([np.array(ids, dtype=np.int64) for ids in token_ids])
    return np.where(flat < 0, -1 - flat, flat)


def write_kept(path: Path, config: VocabularyConfig, student: Student, reader: Rows) -> Iterator[int]:
    """Writes the ids that `config` keeps of the student's tokens to `path`; yields after each block of texts that is counted.

    Raises ValueError as `TokenTable.select` and `TokenTable.read_tokens` do.
    """
    table = TokenTable(student.tokenizer, student.encoder.config)
    counts: Mapping[int, int] = {}
    if config.tokens is not None:
        counts = dict.fromkeys(table.read_tokens(Path(config.tokens)), 1)
    else:
        table.check(config)
        for counts in count_tokens(student, reader):
            yield len(counts)
    write_json(path, {"kept": table.select(counts, config.size)})


def read_kept(path: Path) -> list[int] | None:
    """The ids that `write_kept` wrote; None if the file is missing or damaged."""
    found = read_json(path)
    return None if found is None else found["kept"]


@torch.no_grad()
def trim(student: Student, kept: Sequence[int]) -> None:
    """Leaves the student these tokens alone: a tokenizer with them, and their rows of the embedding table, [kept, d].

    kept: distinct ids of the tokenizer, with what `TokenTable.select` always keeps; order does not matter. Raises ValueError
    for an encoder that has another table of tokens, or that would number its positions otherwise.
    """
    encoder, old = student.encoder, student.tokenizer
    described = json.loads(old.backend_tokenizer.to_str())
    inside = _ids_of_model(described["model"])
    order = sorted(kept, key=lambda token_id: (token_id not in inside, token_id))  # the library appends all other added tokens
    new_ids = {token_id: number for number, token_id in enumerate(order)}
    config: Any = encoder.config
    if config.model_type in FROM_PADDING and new_ids.get(config.pad_token_id) != config.pad_token_id:
        raise ValueError(
            f"student.vocabulary: a {config.model_type} numbers positions from its padding token {config.pad_token_id}, which"
            f" would become {new_ids.get(config.pad_token_id)}; leave it out, or name another encoder"
        )
    student.tokenizer = _rebuilt(old, described, new_ids)
    student.__dict__.pop("_fast_tokenizer", None)  # that of the tokenizer before
    for name, value in config.to_dict().items():
        if name.endswith("token_id") and value is not None:
            several = [new_ids[each] for each in value if each in new_ids] if isinstance(value, list) else None
            setattr(config, name, new_ids.get(value) if several is None else several)
    config.vocab_size = len(order)
    whole: Any = encoder.get_input_embeddings().weight
    rows = nn.Parameter(whole[torch.tensor(order, device=whole.device)].clone(), requires_grad=whole.requires_grad)
    modules: Iterator[Any] = encoder.modules()
    for module in modules:
        if isinstance(module, nn.Embedding) and module.weight is whole:
            module.weight, module.num_embeddings = rows, len(order)
            if module.padding_idx is not None:
                module.padding_idx = new_ids.get(module.padding_idx)
    if unlike := unlike_its_config(encoder):
        raise ValueError(
            f"student.vocabulary: a {config.model_type} has another part of the size of its vocabulary ({unlike[0]}); leave it"
            " out, or name another encoder"
        )


def _ids_of_model(model: Mapping[str, Any]) -> set[int]:
    return set(range(len(model["vocab"]))) if model["type"] == "Unigram" else set(model["vocab"].values())


def _rebuilt(old: PreTrainedTokenizerBase, described: dict[str, Any], new_ids: Mapping[int, int]) -> PreTrainedTokenizerFast:
    """The tokenizer of the tokens in `new_ids`, with the settings of `old`, whose JSON is `described`.

    Raises ValueError if the library numbers its tokens otherwise.
    """
    model = described["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new_ids]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[number] for token, number in model["vocab"].items() if number in new_ids}
    if model["type"] == "BPE":
        tokens = model["vocab"].keys()
        model["merges"] = [(a, b) for a, b in model["merges"] if tokens >= {a, b, merged(a, b, model)}]
    added = [each | {"id": new_ids[each["id"]]} for each in described["added_tokens"] if each["id"] in new_ids]
    described["added_tokens"] = sorted(added, key=lambda each: each["id"])
    for step in _parts_of(described["post_processor"]):
        if step["type"] == "TemplateProcessing":
            for special in step["special_tokens"].values():
                special["ids"] = [new_ids[number] for number in special["ids"]]
        for name in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
            if name in step:
                step[name][1] = new_ids[step[name][1]]
    if described["padding"] is not None:
        described["padding"]["pad_id"] = new_ids[old.pad_token_id]
    kept_of = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
    new = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        **{name: getattr(old, name) for name in kept_of if hasattr(old, name)},
        **old.special_tokens_map,
        extra_special_tokens=old.extra_special_tokens,
    )
    before = old.get_vocab()
    if any(new_ids.get(before.get(token, -1)) != number for token, number in new.get_vocab().items()):
        raise ValueError("student.vocabulary: the tokens of this tokenizer cannot be renumbered; leave it out")
    return new


class TokenUse:
    """How a student's tokenizer splits texts. unknown: the part of the tokens that is unknown; per_text: tokens of a text."""

    def __init__(self, student: Student, texts: Sequence[str], roles: Sequence[Role | None]) -> None:
        flat = _flat(student.token_ids(texts, roles))
        unknown = TokenTable(student.tokenizer, student.encoder.config).unknown  # the tokenizer's unk_token may be another
        self.unknown = 0.0 if unknown is None else float((flat == unknown).mean())
        self.per_text = len(flat) / len(texts)


def trim_and_describe(student: Student, kept: Sequence[int], held_out: Rows | None) -> str:
    """`trim`; returns what it changed in one line. held_out: texts on which both tokenizers are measured."""
    rows = evenly_spread(len(held_out), MEASURED_ROWS) if held_out is not None else np.zeros(0, np.int64)
    texts, roles = (held_out.texts(rows), held_out.roles(rows)) if held_out is not None and len(rows) else ([], [])
    before = TokenUse(student, texts, roles) if texts else None
    num_tokens, num_before = len(student.tokenizer), _num_parameters(student)
    trim(student, kept)
    told = f"{len(kept):,} of {num_tokens:,} tokens; {num_before:,} parameters before, {_num_parameters(student):,} after"
    if before is not None:
        after = TokenUse(student, texts, roles)
        told += (
            f"; in {len(texts):,} held-out texts {100 * before.unknown:.3f}% of the tokens unknown before,"
            f" {100 * after.unknown:.3f}% after, {before.per_text:.2f} tokens per text before, {after.per_text:.2f} after"
        )
    return told


def _num_parameters(student: Student) -> int:
    return sum(parameter.numel() for parameter in student.parameters())
