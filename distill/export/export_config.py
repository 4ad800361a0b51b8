"""The config section `export`."""

from __future__ import annotations

from typing import Literal

from distill.run.config import Section, result


class ExportConfig(Section):
    """What is written of each student, under runs/NAME/export/STAGE."""

    formats: list[Literal["onnx", "onnx-int8"]] = result(
        [], description="written beside the sentence-transformers folder; they need `bash launcher/install.sh quickstart,onnx`"
    )
