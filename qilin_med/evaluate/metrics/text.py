"""BLEU and ROUGE of Chinese texts in points from 0 to 100, each under three conventions that do not compare.

- `char`, `word`: both on characters, or both on jieba's words, without white space; ROUGE is F1.
- `published`: as the paper's script and CMExam's (`evaluate_gpt_result`) compute them, and the only one to set beside the
  paper's figures: BLEU on jieba's words, ROUGE on characters, ROUGE-L an F whose beta is precision / recall.

Everywhere BLEU is that of the corpus, without smoothing; ROUGE is the mean over texts, ROUGE-1 and -2 on distinct n-grams.
Every name carries its convention: `bleu1_char`, `rougeL_published`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jieba
import numpy as np
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import BLEU

from qilin_med.evaluate.metrics.statistics import Score, mean_score

jieba.setLogLevel(logging.WARNING)

BLEU_ORDERS = (1, 4)
_BLEU = BLEU(tokenize="none", force=True, smooth_method="none")

Row = dict[str, Any]


def split_text(text: str, convention: str) -> tuple[list[str], list[str]]:
    """What BLEU and what ROUGE counts."""
    if convention != "published":
        tokens = [token for token in (text if convention == "char" else jieba.lcut(text)) if not token.isspace()]
        return tokens, tokens
    # sacrebleu would pass over white space, so it gets a name.
    words = [f"<{word.encode().hex()}>" if word.isspace() else word for word in jieba.lcut(text)]
    # The paper's script joins characters by blanks and splits them again, so that a blank is two empty tokens.
    return words, " ".join(text).split(" ") if text else []


def score_text(prediction: str, reference: str) -> Row:
    """One row by metric name: ROUGE, and the counts that corpus BLEU is made of (`bleu_of_counts`)."""
    row: Row = {}
    for convention in ("char", "word", "published"):
        # The paper's script takes blanks out of answers, not out of references.
        answer = prediction.replace(" ", "") if convention == "published" else prediction
        (words, tokens), (wanted_words, wanted) = (split_text(text, convention) for text in (answer, reference))
        bleu = _BLEU.corpus_score([" ".join(words)], [[" ".join(wanted_words)]])
        for n in BLEU_ORDERS:
            row[f"bleu{n}_{convention}"] = [bleu.sys_len, bleu.ref_len, *bleu.counts[:n], *bleu.totals[:n]]
        for name, (precision, recall) in _rouge(tokens, wanted).items():
            beta = precision / recall if recall and (name, convention) == ("rougeL", "published") else 1.0
            row[f"{name}_{convention}"] = _f_measure(precision, recall, beta)
    return row


def _rouge(tokens: Sequence[str], expected: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(precision, recall) of distinct n-grams, and of the longest common subsequence (Lin 2004)."""
    shares = {}
    for order in (1, 2):
        given, wanted = (set(zip(*(side[n:] for n in range(order)), strict=False)) for side in (tokens, expected))
        shares[f"rouge{order}"] = len(given & wanted) / max(len(given), 1), len(given & wanted) / max(len(wanted), 1)
    common = LCSseq.similarity(tokens, expected)
    return shares | {"rougeL": (common / max(len(tokens), 1), common / max(len(expected), 1))}


def _f_measure(precision: float, recall: float, beta: float = 1.0) -> float:
    """In points; 0 without anything in common."""
    weighted = beta**2 * precision + recall
    return 100 * (1 + beta**2) * precision * recall / weighted if weighted else 0.0


def text_scores(rows: list[Row]) -> dict[str, Score]:
    """Scores of a test set from its rows (`score_text`, and whatever else has a mean), by name."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: Score(np.array(column, dtype=float), bleu_of_counts) if name.startswith("bleu") else mean_score(column)
        for name, column in columns.items()
    }


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU [...] in points, from sums or means of [length, reference length, matching n-grams and n-grams of every
    order] [..., 2 + 2 orders] (Papineni et al. 2002, unsmoothed)."""
    length, reference = counts[..., 0], counts[..., 1]
    matches, totals = np.split(counts[..., 2:], 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(totals > 0, matches / totals, 0.0)
        brevity = np.where(length > 0, np.minimum(1.0, np.exp(1 - reference / length)), 0.0)
        return 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))


def corpus_bleu(rows: list[list[int]]) -> float:
    """Corpus BLEU in points of all rows' counts, as lm-evaluation-harness aggregates."""
    return float(bleu_of_counts(np.sum(rows, axis=0, dtype=float)))
