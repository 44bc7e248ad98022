"""BLEU and ROUGE of Chinese texts, on characters and on jieba words, in points from 0 to 100.

On characters as CMExam's own evaluation does: corpus BLEU without smoothing, means of ROUGE F1. Figures of the two units
do not compare, so every name carries its unit: `bleu1_char`, `rougeL_word`.
"""

import logging
import sys
from typing import Any

import jieba
import numpy as np
from rouge_chinese import Rouge
from sacrebleu.metrics import BLEU

from qilin_med.evaluate.metrics.statistics import Score, mean_score

jieba.setLogLevel(logging.WARNING)

UNITS = ("char", "word")
ROUGE = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}
BLEU_ORDERS = (1, 4)
_BLEU, _ROUGE = BLEU(tokenize="none", force=True, smooth_method="none"), Rouge()

Row = dict[str, Any]


def split_text(text: str, unit: str) -> list[str]:
    """Characters or jieba's words, without white space."""
    return [token for token in (text if unit == "char" else jieba.lcut(text)) if not token.isspace()]


def score_text(prediction: str, reference: str) -> Row:
    """One row by metric name: ROUGE F1, and the counts that corpus BLEU is made of (`bleu_of_counts`)."""
    row: Row = {}
    for unit in UNITS:
        tokens, expected = split_text(prediction, unit), split_text(reference, unit)
        bleu = _BLEU.corpus_score([" ".join(tokens)], [[" ".join(expected)]])
        for order in BLEU_ORDERS:
            row[f"bleu{order}_{unit}"] = [bleu.sys_len, bleu.ref_len, *bleu.counts[:order], *bleu.totals[:order]]
        row |= {f"{name}_{unit}": value for name, value in _rouge(tokens, expected).items()}
    return row


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


def _rouge(tokens: list[str], expected: list[str]) -> dict[str, float]:
    """F1 in points; 0 where either text is empty (rouge-chinese would raise)."""
    if not tokens or not expected:
        return dict.fromkeys(ROUGE, 0.0)
    # rouge-chinese walks back through a pair of texts by one call per token, more than Python allows for long ones.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 2 * (len(tokens) + len(expected)))
    try:
        [scores] = _ROUGE.get_scores(" ".join(tokens), " ".join(expected))
    finally:
        sys.setrecursionlimit(limit)
    return {name: 100 * scores[key]["f"] for name, key in ROUGE.items()}
