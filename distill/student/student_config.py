"""The config section `student`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from distill.run.config import Section, result

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
    pooling: Pooling = result("mean", description="token vectors to one text vector; last4: the mean of the last four layers")
    max_length: int = result(64, gt=2, description="tokens; longer texts are truncated")

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
