"""The config section `text`: where the training texts come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from distill.run.config import FileName, Section, result, settings
from distill.run.prompts import Role

MAX_COLUMNS = 100  # of a source of parallel text


class SourceConfig(Section):
    """Where texts come from: local files, files of texts with their translations, or a Hugging Face dataset."""

    type: Literal["file", "huggingface", "parallel"] = result(
        description="the kind of source; parallel: texts and translations"
    )
    path: FileName | None = result(
        None, description="file, parallel: a path or glob; .txt (file alone) .tsv .csv .jsonl .parquet, plain, .gz or .zst"
    )
    columns: list[str] | None = result(
        None,
        omit_default=True,
        max_length=MAX_COLUMNS,
        description="parallel: the columns or fields; the teacher embeds the first, and the student learns its vector for all,"
        " with equal shares of the source's training samples; an empty text is no translation",
    )
    name: FileName | None = result(None, description="huggingface: the dataset's name")
    subset: str | None = result(None, description="huggingface: the dataset's configuration")
    split: str = result("train", description="huggingface: the split")
    revision: str | None = result(None, description="huggingface: the commit to read")
    field: str | None = result(None, description="the column or field that holds the text, or a list of texts (not for .txt)")
    limit: int | None = result(None, gt=0, description="number of raw texts after which reading this source stops")
    role: Role | None = result(
        None, description="what the texts are in retrieval: teacher and student put their own prompt for it before them"
    )
    prompt: str | None = result(None, description="what the teacher reads before each text, instead of its own prompt")
    weight: float | None = result(
        None,
        gt=0,
        description="the source's share of the training samples, relative to the other sources' weights: its texts are repeated"
        " or thinned out; all sources have a weight, or none; null: each text once an epoch",
    )

    @field_validator("type", mode="before")
    @classmethod
    def _is_no_former_type(cls, value: Any) -> Any:
        if value == "python-docs":
            raise ValueError(
                "python-docs is no longer a type of source; run `python launcher/quickstart_text.py` and name the file that it"
                " writes: {type: file, path: runs/quickstart-text/docstrings.txt}"
            )
        return value

    @model_validator(mode="after")
    def _has_its_keys(self) -> SourceConfig:
        if self.type == "file" and not self.path:
            raise ValueError("a source of type file needs `path`")
        if self.type == "parallel":
            if not self.path or self.field is not None:
                raise ValueError("a source of type parallel needs `path` and `columns`, and has no `field`")
            if len(set(self.columns or [])) < 2 or len(set(self.columns or [])) < len(self.columns or []):
                raise ValueError("columns must name the teacher's column and at least one other, each once")
        elif self.columns is not None:
            raise ValueError("`columns` is for a source of type parallel")
        if self.type == "huggingface" and not (self.name and self.field):
            raise ValueError("a source of type huggingface needs `name` and `field`")
        return self

    def identity(self) -> dict[str, Any]:
        """All that decides its texts, as JSON: not the weight, by which they are sampled in training."""
        return settings(self, "result", overrides={"weight": "speed"})


class TextConfig(Section):
    """The texts that the teacher embeds: deduplicated, filtered by length; those with text hash mod 50 = 0 are held out."""

    sources: list[SourceConfig] = result(
        min_length=1,
        max_length=65_535,
        description="read one after the other; a plain path or glob stands for {type: file, path: ...}",
    )
    min_chars: int = result(
        1, ge=1, description="texts of fewer visible characters are dropped, and counted; a run of whitespace counts as one"
    )
    max_chars: int | None = result(None, ge=1, description="longer texts are dropped, and counted; null: none")
    long: Literal["truncate", "chunk", "drop"] = result(
        "truncate",
        omit_default=True,
        description="texts of more tokens than the teacher reads (teacher.max_length, with prompt and special tokens)."
        " truncate: it reads their beginning; chunk: they are cut into several texts, at sentences and lines where possible;"
        " drop: they are dropped; both are counted",
    )
    max_sentences: int | None = result(
        None, gt=0, description="largest number of training texts; a uniform sample by text hash; null: all"
    )
    held_out: int = result(10_000, ge=0, description="number of held-out texts (text hash mod 50 = 0) to embed, for fidelity")

    @field_validator("sources", mode="before")
    @classmethod
    def _paths_are_files(cls, sources: Any) -> Any:
        given = [sources] if isinstance(sources, str) else sources
        if not isinstance(given, list):
            return given
        return [{"type": "file", "path": source} if isinstance(source, str) else source for source in given]

    @model_validator(mode="after")
    def _weights_are_complete(self) -> TextConfig:
        missing = [number for number, source in enumerate(self.sources) if source.weight is None]
        if missing and len(missing) < len(self.sources):
            raise ValueError(f"sources[{missing[0]}] has no weight, and others have: give every source a weight, or none")
        return self

    @property
    def weights(self) -> list[float]:
        """The sources' shares of the training samples, relative to each other; [] where each text is seen once an epoch."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights if len(weights) > 1 else []

    def identity(self) -> dict[str, Any]:
        """All that decides which texts are prepared, as JSON."""
        return settings(self, "result") | {"sources": [source.identity() for source in self.sources]}

    @property
    def num_translations(self) -> int:
        """The largest number of translations that a text of any source may have."""
        return max(len(source.columns or [""]) - 1 for source in self.sources)

    @model_validator(mode="after")
    def _limits_leave_room(self) -> TextConfig:
        if self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}: no text can pass")
        if self.long == "chunk" and self.num_translations:
            raise ValueError("long is chunk, and a text's translations cannot be cut where it is: use drop, or truncate")
        return self
