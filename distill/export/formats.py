"""The formats of an export: the file of each, its lowest cosine to the student, and the packages it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """`file` marks that the format is there; `lowest`: a lower cosine to the student's vectors is an error."""

    file: str
    lowest: float


FORMATS = {
    "sentence-transformers": Format("modules.json", 0.9999),
    "onnx": Format("onnx/model.onnx", 0.9999),
    "onnx-int8": Format("onnx/model_quantized.onnx", 0.99),
}
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # torch's exporter imports onnxscript


def require_packages(formats: Collection[str]) -> None:
    """Raises ValueError if `formats` (of the config's export.formats) need packages that are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if formats and missing:
        raise ValueError(
            f"export.formats [{', '.join(formats)}] needs the packages {', '.join(missing)}:"
            " bash launcher/install.sh quickstart,onnx, or leave export.formats empty"
        )
