"""What a model keeps: STS, retrieval, transfer and fidelity to its teacher, as plain dicts of the names in results.json.

    encode.py      a folder or hub name   -> Encoder: sentences to vectors, and sentences a second
    tasks.py       folders or hub names   -> Tasks: all sets; their sentences; all scores of one Encode
    sts.py         Encode + the STS sets  -> {"sts", "sts_ci", "sts_resamples", "sts_warnings"}
    retrieval.py   Encode + BEIR sets     -> {"retrieval", "retrieval_ci", "retrieval_resamples"}, small vectors among them
    transfer.py    Encode + labelled sets -> {"transfer", "transfer_ci", "transfer_resamples"}
    fidelity.py    student and teacher vectors of the same sentences -> {"spearman", "spearman_top50", "top10"}
    neighbours.py  the same               -> where they agree and where they differ most, with examples
    compare.py     two results            -> differences with intervals
    report.py      results                -> aligned tables

beir.py reads retrieval sets, hub.py and tsv.py what comes from the hub and from tab-separated files. quantise.py makes int8 and
binary vectors, index.py searches them through faiss. rank.py holds Spearman's correlation and its bootstrap, bootstrap.py every
other. over_ranks.py encodes on many ranks at once.
"""

from distill.evaluation.encode import Encode, Encoder, encoder_of, throughput
from distill.evaluation.fidelity import fidelity
from distill.evaluation.report import table
from distill.evaluation.retrieval import retrieval_scores
from distill.evaluation.sts import dev_score, sts_scores
from distill.evaluation.tasks import Encoded, Tasks, read_tasks
from distill.evaluation.transfer import transfer_scores

__all__ = [
    "Encode",
    "Encoded",
    "Encoder",
    "Tasks",
    "dev_score",
    "encoder_of",
    "fidelity",
    "read_tasks",
    "retrieval_scores",
    "sts_scores",
    "table",
    "throughput",
    "transfer_scores",
]
