"""The config section `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import StringConstraints

from distill.run.config import Section, result

LanguageCode = Annotated[str, StringConstraints(pattern="^[a-z]{2,3}$")]


class ExportConfig(Section):
    """What is written of each student, under runs/NAME/export/STAGE."""

    formats: list[Literal["onnx", "onnx-int8"]] = result(
        [], description="written beside the sentence-transformers folder; they need `bash launcher/install.sh quickstart,onnx`"
    )
    asymmetric: bool = result(
        False,
        omit_default=True,
        description="also write STAGE-asymmetric of each student that has learned the teacher's space: it encodes queries for"
        " an index of documents that the teacher embedded",
    )
    language: list[LanguageCode] | None = result(
        None, description='ISO 639 codes of the text\'s languages, for the model cards, e.g. [en, "no"]'
    )
