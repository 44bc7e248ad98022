"""BLEU and ROUGE of Chinese texts, on characters and on jieba words, in points from 0 to 100.

On characters as CMExam's own evaluation does: corpus BLEU without smoothing, means of ROUGE F1. Figures of the two units
do not compare, so every name carries its unit: `bleu1_char`, `rougeL_word`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qilin_med.evaluate.metrics.statistics import Score, mean_score

if TYPE_CHECKING:
    from rouge_chinese import Rouge
    from sacrebleu.metrics import BLEU

UNITS = ("char", "word")
ROUGE = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}
BLEU_ORDERS = (1, 4)
ORDERS = max(BLEU_ORDERS)

Row = dict[str, Any]


def split_text(text: str, unit: str) -> list[str]:
    """Characters without white space, or jieba's words."""
    if unit == "char":
        return [character for character in text if not character.isspace()]
    return [word for word in _jieba().lcut(text) if not word.isspace()]


def score_text(prediction: str, reference: str) -> Row:
    """One row by metric name: ROUGE F1, and the counts that corpus BLEU is made of (`bleu_counts`)."""
    row: Row = {}
    for unit in UNITS:
        tokens, expected = split_text(prediction, unit), split_text(reference, unit)
        counts = bleu_counts(tokens, expected)
        row |= {f"bleu{order}_{unit}": _up_to(order, counts) for order in BLEU_ORDERS}
        row |= {f"{name}_{unit}": value for name, value in rouge(tokens, expected).items()}
    return row


def text_scores(rows: list[Row]) -> dict[str, Score]:
    """Scores of a test set from its rows (`score_text`), by name."""
    scores = {}
    for unit in UNITS:
        for order in BLEU_ORDERS:
            counts = np.array([row[f"bleu{order}_{unit}"] for row in rows], dtype=float)
            scores[f"bleu{order}_{unit}"] = Score(counts, bleu_of_counts)
        scores |= {f"{name}_{unit}": mean_score([row[f"{name}_{unit}"] for row in rows]) for name in ROUGE}
    return scores


# ---------------------------------------------------------------------------------------------------------- BLEU


def bleu_counts(tokens: list[str], expected: list[str]) -> list[int]:
    """[length, reference length, matching n-grams of order 1 to 4, n-grams of order 1 to 4] of one text."""
    if not tokens or not expected:
        return [len(tokens), len(expected)] + [0] * ORDERS + [max(len(tokens) - n, 0) for n in range(ORDERS)]
    score = _sacrebleu().corpus_score([" ".join(tokens)], [[" ".join(expected)]])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _up_to(order: int, counts: list[int]) -> list[int]:
    return [*counts[: 2 + order], *counts[2 + ORDERS : 2 + ORDERS + order]]


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU [...] in points from sums or means of counts [..., 2 + 2 orders] (Papineni et al. 2002, unsmoothed)."""
    length, reference = counts[..., 0], counts[..., 1]
    matches, totals = np.split(counts[..., 2:], 2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(totals > 0, matches / totals, 0.0)
        brevity = np.where(length > 0, np.minimum(1.0, np.exp(1 - reference / length)), 0.0)
        return 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))


def corpus_bleu(rows: list[list[int]]) -> float:
    """Corpus BLEU in points of all rows' counts."""
    return float(bleu_of_counts(np.sum(rows, axis=0, dtype=float)))


@cache
def _sacrebleu() -> "BLEU":
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", force=True, smooth_method="none")


# --------------------------------------------------------------------------------------------------------- ROUGE


def rouge(tokens: list[str], expected: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 in points; 0 where either text is empty (rouge-chinese would raise)."""
    if not tokens or not expected:
        return dict.fromkeys(ROUGE, 0.0)
    with _deep_recursion(len(tokens) + len(expected)):
        [scores] = _rouge().get_scores(" ".join(tokens), " ".join(expected))
    return {name: 100 * scores[key]["f"] for name, key in ROUGE.items()}


@contextmanager
def _deep_recursion(depth: int) -> Iterator[None]:
    """rouge-chinese walks back through a sentence pair by one call a token, more than Python allows for long ones."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 2 * depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@cache
def _rouge() -> "Rouge":
    from rouge_chinese import Rouge

    return Rouge()


@cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba
