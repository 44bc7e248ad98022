"""Text -> the terms that BM25 counts."""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise

RUN = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]+")


def terms_of(unit: str) -> Callable[[str], list[str]]:
    """The function that gives a text's terms in order; full width and half width, upper and lower case count alike."""
    return {"bigram": cut_bigrams, "word": cut_words}[unit]


def runs_of(text: str) -> list[str]:
    """Runs of Latin letters and digits, and runs of other letters; punctuation and blanks part them."""
    return RUN.findall(unicodedata.normalize("NFKC", text).casefold())


def cut_bigrams(text: str) -> list[str]:
    """Pairs of neighbouring characters; a Latin word or number, and a character alone, is one term."""
    terms: list[str] = []
    for run in runs_of(text):
        if len(run) == 1 or run[0].isascii():
            terms.append(run)
        else:
            terms += map("".join, pairwise(run))
    return terms


def cut_words(text: str) -> list[str]:
    """Words as jieba cuts them for search: long ones and the shorter ones in them."""
    import jieba

    jieba.setLogLevel("WARNING")  # it announces its dictionary on stderr
    return [word for run in runs_of(text) for word in ([run] if run[0].isascii() else jieba.lcut_for_search(run))]
