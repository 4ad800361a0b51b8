"""What is stored of a text, its normal form and 64-bit hash, and whether it is held out from training.

A text is stored, and reaches every encoder, as it is. Two texts of one normal form are duplicates.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

HELD_OUT_MODULUS = 50

# None belongs in a text: control characters break lines, a lone surrogate (JSON's "\ud800") has no UTF-8, and some letters and
# symbols are blanks: of Braille, and the fillers of Hangul.
_BLANK = "\u2800\u3164\uffa0"
_TO_SPACES = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff{_BLANK}]")

# Characters of category Cf that are never seen: soft hyphens, zero-width spaces, marks of direction, byte order marks. Not
# those that some scripts show (Arabic and Kaithi number signs), nor the tags of a flag. And marks that are never seen.
_MARKS = "\u034f\u17b4\u17b5"
_INVISIBLE = (
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
)
_TAGS = "\U000e0020-\U000e007f"
_JOINERS = "\u200c\u200d"  # between letters of other scripts they change the word, between emoji the picture
_UNSEEN = re.compile(f"[{_INVISIBLE}{_MARKS}{_JOINERS}]|(?<![\U0001f3f4{_TAGS}])[{_TAGS}]+")
_PRINTABLE_BUT_UNSEEN = re.compile(f"[{_BLANK}{_MARKS}]")
# Without a letter beside them these are not seen either.
_NOTHING = re.compile("[\\s\u115f\u1160\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]+")
_NOT_STORED = re.compile("[\x00\ud800-\udfff]")

NORMAL_FORM = 2
"""The version of `normal_form`: with another one, other texts are held out."""


def stored(text: str) -> str:
    """The text as it is, but for what no UTF-8 file of texts can hold: NUL is a space, a lone surrogate U+FFFD."""
    return _NOT_STORED.sub(lambda found: " " if found[0] == "\x00" else "\ufffd", text)


def normal_form(text: str) -> str:
    """NFC, without invisible characters, every run of whitespace, control characters, blanks and lone surrogates as one space,
    none at the ends; '' for a text of which nothing is seen.

    The result is one line by every definition of a line, encodes as UTF-8, and is its own normal form.
    """
    text = unicodedata.normalize("NFC", text)
    if not text.isprintable() or (not text.isascii() and _PRINTABLE_BUT_UNSEEN.search(text)):
        text = _UNSEEN.sub("", _TO_SPACES.sub(" ", text))
        text = unicodedata.normalize("NFC", text)  # what an invisible character kept apart
    return "" if _NOTHING.fullmatch(text) else " ".join(text.split())


def text_hash(text: str) -> int:
    """The hash that identifies a text: blake2b of the UTF-8 of its normal form, 8 bytes, little endian, as a signed int64."""
    return hash_of_form(normal_form(text))


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """The `text_hash` of each text, int64 [n]."""
    return np.fromiter(map(text_hash, texts), np.int64, len(texts))


def hash_of_form(text: str) -> int:
    """The hash of a text that is in its normal form."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def is_held_out(hashes: np.ndarray) -> np.ndarray:
    """For text hashes, int64 of any shape: True where the text is kept for evaluation and never trained on."""
    return np.asarray(hashes, dtype=np.int64).view(np.uint64) % np.uint64(HELD_OUT_MODULUS) == 0
