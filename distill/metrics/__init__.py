"""Metrics of text vectors, as pure functions, and the schema of results.json.

vectors.py     Encode: texts to vectors; L2 normalisation          quantise.py  float16, int8 and binary vectors
sts.py         Encode + STS pairs -> Spearman x 100, intervals      fidelity.py  student and teacher vectors -> their agreement
spearman.py    Spearman's correlation and its bootstrap             bootstrap.py resampled means, intervals, paired differences
held_out.py    the split of the held-out texts                      results.py   ModelResults: what a model reached
"""
