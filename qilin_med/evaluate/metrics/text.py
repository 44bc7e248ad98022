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

UNITS = ("char", "word")
BLEU_ORDERS = (1, 4)
_BLEU = BLEU(tokenize="none", force=True, smooth_method="none")

Row = dict[str, Any]


def split_text(text: str, unit: str) -> list[str]:
    """Characters or jieba's words, without white space."""
    return [token for token in (text if unit == "char" else jieba.lcut(text)) if not token.isspace()]


def score_text(prediction: str, reference: str) -> Row:
    """One row by metric name: ROUGE, and the counts that corpus BLEU is made of (`bleu_of_counts`)."""
    row: Row = {}
    for unit in UNITS:
        tokens, expected = split_text(prediction, unit), split_text(reference, unit)
        f1 = {name: _f_measure(*shares) for name, shares in _rouge(tokens, expected).items()}
        row |= {f"{name}_{unit}": value for name, value in (_bleu_counts(tokens, expected) | f1).items()}
    return row | {f"{name}_published": value for name, value in _score_as_published(prediction, reference).items()}


def _score_as_published(prediction: str, reference: str) -> Row:
    """By metric. The paper's script takes blanks out of answers alone; all other white space counts."""
    texts = prediction.replace(" ", ""), reference
    # sacrebleu would pass over white space, so it gets a name.
    words = ([f"<{word.encode().hex()}>" if word.isspace() else word for word in jieba.lcut(text)] for text in texts)
    # The script joins characters by blanks and splits them again, so that a blank is two empty tokens.
    shares = _rouge(*(" ".join(text).split(" ") if text else [] for text in texts))
    precision, recall = shares["rougeL"]
    scores = {name: _f_measure(*pair) for name, pair in shares.items()}
    return _bleu_counts(*words) | scores | {"rougeL": _f_measure(precision, recall, precision / (recall or 1))}


def _bleu_counts(tokens: Sequence[str], expected: Sequence[str]) -> Row:
    found = _BLEU.corpus_score([" ".join(tokens)], [[" ".join(expected)]])
    counts = {n: [found.sys_len, found.ref_len, *found.counts[:n], *found.totals[:n]] for n in BLEU_ORDERS}
    return {f"bleu{order}": row for order, row in counts.items()}


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
