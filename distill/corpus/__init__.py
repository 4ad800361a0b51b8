"""Text sources to numbered files of unique texts, one text a line.

sources.py         a config's sources  -> raw strings, one source after the other
rows.py            one local file      -> its rows
text.py            a raw string        -> what is stored of it, its normal form and 64-bit hash, held out or not
prepare.py         all of it           -> runs/NAME/precompute/text/{000000.txt, ..., held_out.txt, manifest.json}
spool.py           texts of the right length -> working files, from which a killed call continues
long_text.py       a text that is longer than the teacher reads -> parts that are not
deduplication.py   text hashes         -> a status for each text: kept, duplicate, held out, not sampled
chunks.py          texts, translations -> text chunks, complete or absent; and reads them back
"""

from distill.corpus.chunks import TextChunk, read_chunk, read_listed_chunk
from distill.corpus.prepare import can_resume, held_out_sources, prepare_text
from distill.corpus.rows import read_rows
from distill.corpus.sources import read_dataset, read_source
from distill.corpus.text import HELD_OUT_MODULUS, is_held_out, normal_form, text_hash, text_hashes

__all__ = [
    "HELD_OUT_MODULUS",
    "TextChunk",
    "can_resume",
    "held_out_sources",
    "is_held_out",
    "normal_form",
    "prepare_text",
    "read_chunk",
    "read_dataset",
    "read_listed_chunk",
    "read_rows",
    "read_source",
    "text_hash",
    "text_hashes",
]
