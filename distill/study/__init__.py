"""Several students of one teacher beside each other: trained, measured on the same sentences, put into one table.

A study is a folder of configs, one a student, that take their shards from one run (`shards_from`) and what they share from a
base.yaml. Everything lies under their runs_dir:

    NAME.yaml               the config of a student as it is run
    NAME/                   its run
    measured/NAME.json      the figures of one model, with the resamples of their intervals
    results.json            all rows without the resamples: what the table and the plots are made from

A row is a model at one size: every trained stage, HPD's nested sizes; what one would do instead of training (the student before
it, the teacher's and the student's vectors cut by PCA); and the teacher itself. Each is measured with float32, int8 and binary
vectors. What is trained or measured already is not done again.

configs.py   which students
models.py    which rows they give
measure.py   their figures
table.py     as text and markdown
plots.py     as pictures
"""

from distill.study.configs import configs_of
from distill.study.measure import Bench, measure_all
from distill.study.models import models_of
from distill.study.plots import draw, require_matplotlib
from distill.study.table import markdown, results_of, text

__all__ = ["Bench", "configs_of", "draw", "markdown", "measure_all", "models_of", "require_matplotlib", "results_of", "text"]
