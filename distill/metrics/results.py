"""results.json: what the evaluate stage measures of each model, and what everything that shows or compares it reads.

{"version": 1, "teacher": {...}, "ckd": {...}, "hpd": {...}, "hpd-64": {...}}      of a run: RunResults
{"version": 1, "dim": 384, "params": 22713216, ...}                                of one model: launcher/evaluate.py --out
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.run.files import read_json, write_json

VERSION = 1
TEACHER = "teacher"  # the name of the teacher's results in a run
Interval = tuple[float, float]
Scores = dict[str, float | list[str]]
Number = int | float


class Resampled(BaseModel):
    """A score on bootstrap resamples of its set. sample: identifies the resamples; scores with the same one are paired."""

    score: float
    sample: str
    values: list[float]


class Fidelity(BaseModel):
    """Agreement with the teacher on `texts` held-out texts, see metrics/fidelity.py: correlations in -1..1, top10 in 0..1."""

    spearman: float
    spearman_top50: float
    top10: float
    texts: int


class Overlap(BaseModel):
    """Of the distinct texts of a part of an evaluation set, `texts`, those that a model was trained on, `found`."""

    found: int
    texts: int


class ModelResults(BaseModel):
    """What was measured of one model at one size. Sets that were not measured are absent; *_ci are 95% intervals.

    dtype          that the model ran in: float32, bfloat16, float16
    fidelity_by_role
                   the same among the held-out queries and documents alone, where there are texts of several roles
    fidelity_of_translations
                   of parallel text, by the names of columns: translations, against the teacher's vectors of the texts
    sts            set -> Spearman x 100; AVG: the mean of the sets AVG_OF
    sts_quantised  float16, int8, binary -> the same with such vectors
    retrieval      set -> ndcg@10, recall@10, recall@100, mrr@10 of exact search, 0..1; index type -> the same and its costs
    mteb           task of the mteb library -> its main score as mteb has it, mostly 0..1
    transfer       set -> accuracy, majority, labels, train, test, C
    overlap        set -> texts, or queries and documents -> those among the training text, of a run's students
    resamples      of each task, by the name of the score: "STS AVG", "scifact int8 ndcg@10", "sst2 accuracy"
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    dim: int
    params: int
    dtype: str | None = None
    bytes_per_vector: int
    texts_per_second: float | None = None
    fidelity: Fidelity | None = None
    fidelity_by_role: dict[str, Fidelity] = {}
    fidelity_of_translations: dict[str, Fidelity] = {}
    sts: Scores = {}
    sts_ci: dict[str, Interval] = {}
    sts_quantised: dict[str, Scores] = {}
    sts_resamples: dict[str, Resampled] = {}
    sts_warnings: list[str] = []
    retrieval: dict[str, dict[str, Number | dict[str, Number]]] = {}
    retrieval_ci: dict[str, dict[str, Interval | dict[str, Interval]]] = {}
    retrieval_resamples: dict[str, Resampled] = {}
    mteb: dict[str, float] = {}
    transfer: dict[str, dict[str, Number]] = {}
    transfer_ci: dict[str, dict[str, Interval]] = {}
    transfer_resamples: dict[str, Resampled] = {}

    overlap: dict[str, dict[str, Overlap]] = {}

    @property
    def resamples(self) -> dict[str, Resampled]:
        return self.sts_resamples | self.retrieval_resamples | self.transfer_resamples

    def at(self, *keys: str) -> Any:
        """The value at a path of JSON keys, such as ("sts", "AVG"); None where there is none."""
        found: Any = self
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)
        return found

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True)


class RunResults(BaseModel):
    """The results of several models by their names."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ModelResults] = Field(init=False)

    version: Literal[1]

    @property
    def models(self) -> dict[str, ModelResults]:
        return self.__pydantic_extra__


def write_results(path: Path, models: Mapping[str, ModelResults]) -> None:
    """Publishes the results of several models."""
    write_json(path, {"version": VERSION} | {name: results.to_json() for name, results in models.items()})


def write_model_results(path: Path, results: ModelResults) -> None:
    """Publishes the results of one model."""
    write_json(path, {"version": VERSION} | results.to_json())


def read_results(path: Path) -> dict[str, ModelResults]:
    """The models of a results file by name, in the order of their names; one without a name is called as the file.

    Raises ValueError if the file cannot be read or is not of this version.
    """
    try:
        content = read_json(path)
        if content is None:
            raise ValueError("there is no such file, or it is damaged")
        if "dim" in content:
            content = {"version": content.pop("version", None), path.stem: content}
        return RunResults.model_validate(content).models
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{path} holds no results of version {VERSION} ({where}: {problem['msg']}): measure again") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read the results {path}: {error}") from None
