#!/usr/bin/env python3
"""Writes every trained student of a run as a sentence-transformers folder under runs/NAME/export.

    python launcher/export.py --config configs/quickstart.yaml [export.formats='[onnx, onnx-int8]']

With export.formats the folder also holds onnx/model.onnx and onnx/model_int8.onnx. Every file is compared with the student on
1,000 sentences before it appears.
"""

from __future__ import annotations

import command


def main() -> int:
    config = command.config_of(arguments)
    from distill.export.stage import export_run

    command.quiet_libraries()

    for stage, folder in export_run(config).items():
        print(f"{stage}: {folder}")
    return 0


if __name__ == "__main__":
    arguments = command.parser(__doc__).parse_intermixed_args()
    command.run(main, show_traceback=arguments.traceback)
