"""The teacher, which embeds the text once.

teacher_config.py  the config sections `teacher` and `shards`
identity.py        settings and file digests that identify a teacher's vectors
load.py            any encoder as a SentenceTransformer, on one device or spread over several
batching.py        texts -> token ids -> batches with few distinct shapes
encoder.py         texts -> vectors, by one encoder or several side by side
imported.py        precomputed vectors, with the same interface
reused_run.py      a finished run whose vectors are used again
reused_rows.py     where the texts are in such runs: a lookup on disk
reuse.py           a teacher that embeds only the texts that no such run has
endpoint.py        a server's model, with the same interface, recognised by its vectors of a few texts
endpoint_client.py requests to the server: concurrent, verified, sent again
token_log.py       tokens that a run has sent, over its starts and tasks
truncation.py      whether the server reads the longest texts to their end
claims.py          which task makes which shard
encode_missing.py  text chunks -> the shards that are missing
precompute.py      the stage: prepares the text, encodes what is missing, finishes the shard set
dev_score.py       the teacher's score on STS-B's dev set
"""
