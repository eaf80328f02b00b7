"""Words and runs of letters of a text, hashed; and keys made from them: a signed feature hash of all of them.

The one thing to know: nothing here is trained, so a key means the same in every model, fresh or trained, for ever; texts are
found by the words themselves (`memories.lexicon`), which 256 numbers of a key blur. The
features of a text are its distinct runs of `WORDS` words and of `LETTERS` characters, after composing letters and marks
(NFC) and folding case and white space; each is hashed to a component and a sign (Weinberger et al. 2009), whose inner
products are unbiased estimates of the number of features that two texts share. Keys have length 1: a score is the cosine
of two sets of features. In scripts that put no spaces between words (`UNSPACED`) every character, with its marks, counts
as a word, so that what is compared there are runs of one to four characters.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

import numpy as np

from lmcode.memory.placement import splitmix64

WORDS = (1, 2, 3)
LETTERS = (4,)
UNSPACED = "".join((
    "\u0e00-\u0eff",  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f",  # Myanmar
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf",  # Khmer, Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u1b00-\u1b7f\ua980-\ua9df",  # Balinese, Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",  # Han
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f",  # kana, Bopomofo
    "\ua000-\ua4cf"))  # Yi
# Vowel signs and the like, which belong to the letter before them and are no \w: from Hebrew to Khmer and in later blocks.
# Those of Latin, Greek and Cyrillic stay words of their own, as they always were: most are composed with their letter.
_MARKS = "".join(char for char in map(chr, (*range(0x483, 0x1DC0), *range(0xA800, 0xAC00)))
                 if unicodedata.category(char) in ("Mn", "Mc"))
_WORD = re.compile(rf"[{UNSPACED}][{_MARKS}]*|(?:[^\W{UNSPACED}][{_MARKS}]*)+|[^\w\s]")


def text_key(text: str, dim: int) -> np.ndarray:
    """The key of a text, fp32 [dim], of length 1.

    Raises:
        ValueError: for text of white space only, which has no features, or with a lone surrogate.
    """
    features = features_of(text)
    if not len(features):
        raise ValueError(f"text must hold more than white space: got {text[:40]!r}")
    place, sign = features % np.uint64(dim), 1.0 - 2.0 * (features >> np.uint64(63)).astype(np.float64)
    key = np.bincount(place.astype(np.int64), sign, minlength=dim)
    if not key.any():  # all features cancel out: possible for a few of them only
        key[place[0]] = 1.0
    unit: np.ndarray = (key / np.linalg.norm(key)).astype(np.float32)
    return unit


def features_of(text: str) -> np.ndarray:
    """The distinct features of a text, hashed: uint64, ascending."""
    words, letters = _units(text)
    return np.unique(np.concatenate([*(_runs(words, n, 0) for n in WORDS), *(_runs(letters, n, 1) for n in LETTERS)]))


def words_and_runs(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The words of a text and its runs of `LETTERS` characters, hashed: uint64 both, in their order, with repetitions."""
    words, letters = _units(text)
    return _runs(words, 1, 0), np.concatenate([_runs(letters, n, 1) for n in LETTERS])


def _units(text: str) -> tuple[np.ndarray, np.ndarray]:
    """A number for each word and for each character, uint64, after folding."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    return np.array([zlib.crc32(word.encode("utf-8")) for word in _WORD.findall(text)], np.uint64), letters


def _runs(units: np.ndarray, n: int, kind: int) -> np.ndarray:
    """A hash of each run of n units, uint64; different for words and letters."""
    if len(units) < n:
        return units[:0]
    hashed = np.full(len(units) - n + 1, 2 * n + kind, np.uint64)
    for place in range(n):
        hashed = splitmix64(hashed ^ units[place:len(units) - n + 1 + place])
    return hashed
