"""What a loss term is, and what it sees of a micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


class Attention(NamedTuple):
    """The softmax of some queries over all keys: its log-sum-exp [b] and the keys' weighted sum [b, d]."""

    lse: Tensor
    attended: Tensor


class KeyQuery(NamedTuple):
    """Queries that a term wants to see against all keys.

    vectors [b, d] L2-normalised, without gradient; scale (1,): 1 / temperature.
    """

    vectors: Tensor
    scale: Tensor


@dataclass(frozen=True)
class TermInputs:
    """One micro-batch of b rows as loss terms see it, in the space of width d.

    vectors [b, d]: the student's, not normalised, with gradient. queries [b, d]: the same, L2-normalised. targets [b, d]: the
    teacher's in this space. own_keys [b, d]: each row's own key, fp16 and L2-normalised. scale (1,): exp(logit_scale), with
    gradient. nested: sizes whose prefixes are trained too, the full width first; empty where there are none. all_keys(): the
    keys of the global batch and of the queue, [N, d] fp16. row_seeds(): a seed for each row that only the run's seed, the step
    and the row decide.
    """

    vectors: Tensor
    queries: Tensor
    targets: Tensor
    own_keys: Tensor
    scale: Tensor
    nested: Sequence[int]
    all_keys: Callable[[], Tensor]
    row_seeds: Callable[[], list[int]]


class LossTerm(ABC):
    """One term of a stage's loss.

    name: its key in `weights`. tasks: the tasks that may use it. order: terms of a kind are added up by ascending (order,
    name), so that rounding does not depend on the config. options: the config section of the stage, whose fields a term reads
    as it needs (student_temperature, ...).
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ("ckd", "hpd")
    order: ClassVar[int] = 0

    def __init__(self, options: Any) -> None:
        self.options = options


class RowTerm(LossTerm):
    """A term that sees each row alone; its reference value is 0, the loss of a student that is the teacher."""

    @abstractmethod
    def losses(self, inputs: TermInputs) -> Tensor:
        """The loss of each row, [b]."""


class KeyTerm(LossTerm):
    """A term of the softmax over all keys. All its queries go through the keys in one pass with those of other terms.

    masks_same_text: whether keys of the row's own text or meaning, but for the row's own key, are left out of its softmax.
    """

    masks_same_text: ClassVar[bool] = False

    @abstractmethod
    def queries(self, inputs: TermInputs) -> list[KeyQuery]:
        """The queries whose softmax over all keys `losses` needs."""

    @abstractmethod
    def losses(self, inputs: TermInputs, attentions: Sequence[Attention]) -> Tensor:
        """The loss of each row, [b]. attentions: the softmax over all keys of each KeyQuery that `queries` returned."""

    @abstractmethod
    def reference_query(self, inputs: TermInputs) -> KeyQuery:
        """The query of a student that is the teacher: inputs.own_keys as vectors."""

    @abstractmethod
    def reference_losses(self, inputs: TermInputs, query: KeyQuery, attention: Attention) -> Tensor:
        """The reference value of each row, [b]: the loss of that student."""


class BatchTerm(LossTerm):
    """A term that sees the student's vectors of all rows of the global batch; gradients reach all of them."""

    @abstractmethod
    def losses(self, vectors: Tensor, teacher: Tensor, rows: Tensor, nested: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The losses of the rows [b] and their reference values [b].

        vectors [G, d] not normalised, teacher [G, d_t] as stored, rows [b] int64: which of the G; nested: as in TermInputs.
        """
