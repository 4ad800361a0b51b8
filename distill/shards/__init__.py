"""The on-disk dataset of texts and teacher vectors: plain WebDataset tars that can be verified byte by byte.

    write_shard   texts, hashes, vectors -> 000000.tar + 000000.moments.npz     one shard, complete or absent
    missing       DIR                    -> the shards that are not there yet
    finish        all shards             -> moments.npz, recipe.json and, last, manifest.json
    ShardReader   DIR                    -> reader[i], texts, vectors, hashes; opens only the manifest's shards
    verify_all    DIR                    -> what differs from what was written; `python -m distill.shards repair DIR`

    000000.tar
      000000-000000.embedding.npy   float16 [n, d]   L2-normalised; a block of n = block_rows texts is one WebDataset sample
      000000-000000.hash.npy        int64 [n]        text hashes
      000000-000000.json            rows, shard, sha256 of the other members, fingerprints of teacher and text, sha256 of itself
      000000-000000.offset.npy      uint32 [n + 1]   text i is txt[offset[i] : offset[i + 1] - 1]
      000000-000000.source.npy      uint16 [n]       the number of each text's source, where there are several
      000000-000000.translation01.offset.npy, .txt   of parallel text, each column's translations, as texts are; an empty one is
      ...                                            none, and a column without any in a block is left out
      000000-000000.txt             UTF-8            one text per line
      000000-000001.embedding.npy   ...              all blocks are full but a shard's last

`blocks.py` is the tar's bytes, `format.py` the manifest. Nothing in a set can make a reader run code.
The held-out texts are a set like this one, in the folder held_out/ beside the tars.
"""

from distill.run.files import fingerprint
from distill.shards.format import HELD_OUT, Manifest, ShardError
from distill.shards.moments import Moments
from distill.shards.reader import ShardReader
from distill.shards.repair import repair
from distill.shards.verify import verify_all
from distill.shards.writer import finish, missing, write_shard

__all__ = [
    "HELD_OUT",
    "Manifest",
    "Moments",
    "ShardError",
    "ShardReader",
    "fingerprint",
    "finish",
    "missing",
    "repair",
    "verify_all",
    "write_shard",
]
