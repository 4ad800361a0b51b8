"""Distils a large sentence encoder into a small one.

The data's way, one package or module an arrow:

    corpus/      text sources            -> numbered pieces of unique sentences      runs/NAME/text
    teacher/     pieces                  -> WebDataset shards of text and vectors    runs/NAME/shards
    sampling.py  shards                  -> the global batch of (seed, epoch, step)
    training/    shards + student/       -> a trained student, by objectives/        runs/NAME/{ckd,finetune,hpd}
    export/      a trained student       -> a sentence-transformers folder           runs/NAME/export/STAGE
    evaluation/  exports                 -> results.json and the table               runs/NAME/evaluate
    report/      all of the run          -> one page that needs no network           runs/NAME/report.html

`config.py` says what a run is; `stages.py` says when a stage is done, and what makes it run again.
Nothing here parses a command line, reads the environment or starts a process group: launcher/ does.
"""

__version__ = "0.1.0"
