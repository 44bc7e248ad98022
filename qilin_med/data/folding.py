"""The form in which texts are compared with evaluation questions: only letters and digits, in one writing.

Width, case, punctuation and spaces do not count, traditional characters equal simplified ones, and 一 equals 1. A table
over all code points folds whole batches of texts at once.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

SEVERAL = 0xFFFFFFFF
"""Stands in the table for a sign that folds to several characters (㎎, ⅲ, ½)."""
CODE_POINTS = 0x110000
HAN = range(0x3400, 0xA000)
NUMERALS = str.maketrans("〇零一二两三四五六七八九", "001223456789")


@cache
def folding_table() -> np.ndarray:
    """What each code point becomes; 0 for what is left out."""
    from opencc import OpenCC

    simplified = OpenCC("t2s").convert("\n".join(map(chr, HAN))).split("\n")
    table = np.zeros(CODE_POINTS, np.uint32)
    for code in (*range(0xD800), *range(0xE000, 0x30000)):
        sign = simplified[code - HAN.start] if code in HAN else chr(code)
        folded = _fold_sign(sign.translate(NUMERALS))
        table[code] = 0 if not folded else ord(folded) if len(folded) == 1 else SEVERAL
    return table


def _fold_sign(sign: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", sign).casefold()))


def fold_all(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The folded texts end to end as code points, and the place of each kept one in its text joined to the others.

    The second array gives the way back: folded character i is character `places[i]` of "".join(texts).
    """
    table = folding_table()
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    folded = table[codes]
    places = np.flatnonzero(folded)
    folded = folded[places]
    several = np.flatnonzero(folded == SEVERAL)
    if len(several):
        written_out = [_fold_sign(chr(codes[place])) for place in places[several]]
        counts = np.ones(len(folded), np.int64)
        counts[several] = [len(signs) for signs in written_out]
        folded, places = np.repeat(folded, counts), np.repeat(places, counts)
        folded[folded == SEVERAL] = np.frombuffer("".join(written_out).encode("utf-32-le"), np.uint32)
    return folded, places


def fold(text: str) -> str:
    return fold_all([text])[0].tobytes().decode("utf-32-le", "replace")
