#!/usr/bin/env python3
"""Writes every trained student of a run as a sentence-transformers folder under runs/NAME/export.

    python launcher/export.py --config configs/quickstart.yaml [export.formats='[onnx, onnx-int8]']

With export.formats the folder also holds onnx/model.onnx and onnx/model_quantized.onnx. Every file is compared with the student
on 1,000 texts before it appears. A finished stage whose inputs and config have not changed is skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command.parser(__doc__).parse_intermixed_args(argv)

    def export() -> int:
        import torch

        command.run_stage(arguments, "export", torch.device("cpu"))
        return 0

    return command.run(export, show_traceback=arguments.traceback)


if __name__ == "__main__":
    command.start(main)
