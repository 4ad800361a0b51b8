"""The config section `student`."""

from __future__ import annotations

from typing import Literal

from pydantic import create_model, model_validator

from distill.run.config import FileName, Section, result
from distill.run.prompts import Role

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
    "lasttoken",
    "weightedmean",
    "mean_sqrt_len_tokens",
]


# no attribute of a class can be written `from`
_FROM = (
    Literal["text"] | None,
    result(None, description="text: keep the tokens that occur in the shards' texts, counted in at most 300,000 of them"),
)
_From = create_model("_From", __base__=Section, **{"from": _FROM})  # type: ignore[call-overload]


class VocabularyConfig(_From):
    """The tokens that a student keeps. Special tokens, bytes and the characters of the text are always among them."""

    size: int | None = result(
        None, gt=0, description="from: the largest number of tokens, the most frequent ones; null: all that occur"
    )
    tokens: FileName | None = result(
        None, description="instead of from: a text file of tokens as they are in the tokenizer, one per line"
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> VocabularyConfig:
        if (getattr(self, "from") is None) == (self.tokens is None):
            raise ValueError("student.vocabulary needs one of from and tokens: {from: text, size: 30000} or {tokens: FILE}")
        if self.tokens is not None and self.size is not None:
            raise ValueError("student.vocabulary.size belongs to from: text; a list of tokens is kept whole")
        return self


class StudentConfig(Section):
    """The encoder that is trained, and its pooling."""

    init: str = result("teacher", description="teacher, or a folder, hub name or package:NAME/FOLDER of an encoder")
    from_scratch: bool = result(False, description="init's architecture and tokenizer with new random weights")
    revision: str | None = result(None, description="a hub encoder's commit, tag or branch")
    layers: int | list[int] | None = result(
        None, description="number of init's layers to keep, evenly spread, or a list of those to keep, from 0; null: all"
    )
    freeze_embeddings: bool = result(
        False, description="do not train the token embeddings: leaves about a third of a small student's gradients"
    )
    pooling: Pooling | None = result(
        None,
        description="token vectors to one text vector; last4: the mean of the last four layers; null: init's own, or mean",
    )
    max_length: int | None = result(None, gt=2, description="tokens; longer texts are truncated; null: init's own")
    prompts: dict[Role, str] | None = result(
        None, description='put before texts of a role, e.g. {query: "query: ", document: "passage: "}; null: init\'s own'
    )
    truncate_dim: int | None = result(
        None, ge=1, description="the first dimensions of the vectors; null: init's own, of init: teacher teacher.dimensions"
    )
    is_causal: bool | None = result(
        None, description="false: the tokens of a decoder attend to those after them as well; null: as in init"
    )

    vocabulary: VocabularyConfig | None = result(
        None,
        description="{from: text, size: N} or {tokens: FILE}: keep a part of init's tokens, with a smaller table of embeddings;"
        " null: all",
    )

    @model_validator(mode="after")
    def _layers_are_layers(self) -> StudentConfig:
        if isinstance(self.layers, int):
            if self.layers < 1:
                raise ValueError(f"student.layers {self.layers} must be 1 or more")
        elif self.layers is not None and (len(set(self.layers)) < max(1, len(self.layers)) or min(self.layers) < 0):
            raise ValueError(f"student.layers {self.layers} must be distinct, not negative and at least one")
        return self

    def kept(self, depth: int) -> list[int]:
        """The layers to keep of an encoder with `depth` layers: 3 of 6 are 0, 2, 5.

        Raises ValueError if the encoder has too few.
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
