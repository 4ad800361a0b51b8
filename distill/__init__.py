"""Distills a large sentence encoder into a small one.

The flow of data, one package per step:

    corpus/      text sources             -> numbered chunks of unique texts           runs/NAME/precompute/text
    teacher/     chunks                   -> WebDataset shards of text and vectors     runs/NAME/shards
    training/    shards + student/        -> a trained student, by objectives/         runs/NAME/{ckd,finetune,hpd,simcse}
    export/      a trained student        -> a sentence-transformers folder, ONNX      runs/NAME/export/STAGE
    evaluation/  exports                  -> results.json and tables, by metrics/      runs/NAME/evaluate
    report/      the run's directory      -> one page that needs no network            runs/NAME/report.html

config.py defines a run; run/stage.py decides when a stage is finished and what makes it run again.
Command lines, environment variables and process groups belong to launcher/; README.md lists the few exceptions.
README.md in this directory describes the layers and how to add to them.
"""

__version__ = "0.1.0"
