"""What a model keeps: STS, retrieval and fidelity to its teacher, as plain dicts of the names in results.json.

    encode.py     a folder or hub name   -> Encoder: sentences to vectors, and sentences a second
    sts.py        Encode + the STS sets  -> {"sts", "sts_ci", "sts_warnings"}
    retrieval.py  Encode + a BEIR folder -> {"ndcg@10", "recall@10", "recall@100", "mrr@10"}
    fidelity.py   student and teacher vectors of the same sentences -> {"spearman", "spearman_top50", "top10"}
    report.py     results                -> an aligned table

`rank.py` holds Spearman's correlation and its bootstrap, which sts.py and fidelity.py share.
"""

from distill.evaluation.encode import Encode, Encoder, encoder_of, throughput
from distill.evaluation.fidelity import fidelity
from distill.evaluation.report import table
from distill.evaluation.retrieval import retrieval_scores
from distill.evaluation.sts import dev_score, sts_scores

__all__ = ["Encode", "Encoder", "dev_score", "encoder_of", "fidelity", "retrieval_scores", "sts_scores", "table", "throughput"]
