"""The normal form of a text, its 64-bit hash, and whether it is held out from training."""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np

HELD_OUT_MODULUS = 50

# Neither belongs in a text: control characters break lines, a lone surrogate (JSON's "\ud800") has no UTF-8.
_CONTROLS_AND_SURROGATES = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Characters of category Cf that are never seen: soft hyphens, zero-width spaces, marks of direction, byte order marks. Not
# those that some scripts show (Arabic and Kaithi number signs), nor the tags of a flag.
_INVISIBLE = (
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001"
)
_TAGS = "\U000e0020-\U000e007f"
_JOINERS = "\u200c\u200d"  # between letters of other scripts they change the word, between emoji the picture
_JOINED = f"[^\\x00-\\x7f\\s{_JOINERS}]"
_UNSEEN = re.compile(f"[{_INVISIBLE}]|(?<![\U0001f3f4{_TAGS}])[{_TAGS}]+")
_UNNEEDED_JOINERS = re.compile(f"(?<={_JOINED})([{_JOINERS}])[{_JOINERS}]*(?={_JOINED})|[{_JOINERS}]+")


def normalise(text: str) -> str:
    """NFC, without invisible characters, every run of whitespace, control characters and lone surrogates as one space, none at
    the ends.

    The result is one line by every definition of a line, encodes as UTF-8, and is its own normal form.
    """
    text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        text = _CONTROLS_AND_SURROGATES.sub(" ", text)
        text = _UNNEEDED_JOINERS.sub(r"\1", _UNSEEN.sub("", text))
        text = unicodedata.normalize("NFC", text)  # what an invisible character kept apart
    return " ".join(text.split())


def text_hash(text: str) -> int:
    """The hash that identifies a normalised text: blake2b of its UTF-8, 8 bytes, little endian, as a signed int64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def is_held_out(hashes: np.ndarray) -> np.ndarray:
    """For text hashes, int64 of any shape: True where the text is kept for evaluation and never trained on."""
    return np.asarray(hashes, dtype=np.int64).view(np.uint64) % np.uint64(HELD_OUT_MODULUS) == 0
