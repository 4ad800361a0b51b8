"""Text sources to numbered pieces of unique sentences. Six lines of how:

sources.py     a config's sources     -> raw strings, one after the other
rows.py        one local file         -> its rows;  docstrings.py  installed packages -> their English
text.py        a raw string           -> a normalised sentence, its 64-bit hash, held out or not
prepare.py     all of it              -> runs/NAME/precompute/text/{000000.txt, ..., held_out.txt, manifest.json}
spool.py       sentences that fit     -> working files that a killed reader goes on with
fates.py       hashes, by bucket      -> kept, duplicate, held out or not sampled
pieces.py      lines                  -> files that are complete or absent; and how to read them back
"""

from distill.corpus.pieces import read_piece
from distill.corpus.prepare import can_resume, held_out_sources, prepare_text
from distill.corpus.rows import read_rows
from distill.corpus.sources import read_dataset, read_source, read_sources
from distill.corpus.text import HELD_OUT_MODULUS, is_held_out, normalise, text_hash

__all__ = [
    "HELD_OUT_MODULUS",
    "can_resume",
    "held_out_sources",
    "is_held_out",
    "normalise",
    "prepare_text",
    "read_dataset",
    "read_piece",
    "read_rows",
    "read_source",
    "read_sources",
    "text_hash",
]
