"""The teacher: loaded once, read once, never needed again.

identity.py    what makes vectors this teacher's: model, weights, pooling, length, prompt, precision
encoder.py     any sentence-transformers model, or a plain encoder with its pooling named -> vectors
imported.py    vectors that somebody has already -> the same interface
dev.py         its own score on STS-B's dev set
precompute.py  text pieces -> shards; what is missing is a pure function of the directory
"""
