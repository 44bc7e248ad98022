"""Scores with their uncertainty: seeded bootstrap intervals, and paired tests between two models on the same questions.

A score is a function of the mean of its rows' statistics (accuracy: of one number a row; BLEU: of counts), so that one
bootstrap serves all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 1000
SEED = 12345
_AT_ONCE = 100  # resamples computed together: bounds the memory for large test sets


@dataclass(frozen=True)
class Score:
    """`rows` [questions, statistics] and the function that turns means [..., statistics] into scores [...]."""

    rows: np.ndarray
    of_means: Callable[[np.ndarray], np.ndarray]

    def value(self) -> float:
        return float(self.of_means(self.rows.mean(axis=0)))


def mean_score(values: list[float]) -> Score:
    """The plain mean of one number a question."""
    return Score(np.asarray(values, dtype=float)[:, None], lambda means: means[..., 0])


def bootstrap_interval(score: Score, level: float = 0.95, seed: int = SEED) -> tuple[float, float]:
    """Percentile interval of a score over resampled questions (Efron and Tibshirani 1993, chapter 13)."""
    values = np.concatenate([score.of_means(weights @ score.rows) for weights in _resamples(len(score.rows), seed)])
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def paired_bootstrap(first: Score, second: Score, level: float = 0.95, seed: int = SEED) -> dict[str, float]:
    """Difference second - first on the same questions in the same order: value, interval and two-sided p-value.

    p is the share of resampled differences that lie as far from their own mean as the observed difference from 0, with
    one added to both counts (Riezler and Maxwell 2005; sacrebleu's paired test).
    """
    if len(first.rows) != len(second.rows):
        raise ValueError(f"paired scores need the same questions: found {len(first.rows)} and {len(second.rows)}")
    resampled = [
        second.of_means(weights @ second.rows) - first.of_means(weights @ first.rows)
        for weights in _resamples(len(first.rows), seed)
    ]
    differences, observed = np.concatenate(resampled), second.value() - first.value()
    # Sums of the same values in another order differ in their last bits.
    as_far = int((np.abs(differences - differences.mean()) >= abs(observed) - 1e-12).sum())
    tail = 50 * (1 - level)
    low, high = np.percentile(differences, [tail, 100 - tail])
    p = (as_far + 1) / (len(differences) + 1)
    return {"difference": observed, "low": float(low), "high": float(high), "p": p}


def _resamples(questions: int, seed: int) -> Iterator[np.ndarray]:
    """Weights [resamples, questions] that sum to 1: how often each question was drawn, with replacement."""
    counts = _draw(questions, seed)
    for start in range(0, RESAMPLES, _AT_ONCE):
        yield counts[start : start + _AT_ONCE] / questions


@lru_cache(maxsize=2)  # all scores of a test set are resampled alike
def _draw(questions: int, seed: int) -> np.ndarray:
    """How often each question is drawn, [resamples, questions]."""
    random = np.random.default_rng(seed)
    offsets = questions * np.arange(_AT_ONCE)[:, None]  # so that one count serves many draws
    draws = (random.integers(questions, size=(_AT_ONCE, questions)) + offsets for _ in range(RESAMPLES // _AT_ONCE))
    counts = [np.bincount(draw.ravel(), minlength=draw.size).astype(np.uint8).reshape(draw.shape) for draw in draws]
    return np.concatenate(counts)


def mcnemar(first: list[int], second: list[int]) -> dict[str, float]:
    """Exact McNemar test of two models' 0/1 scores on the same questions (McNemar 1947, with the binomial distribution).

    `gained` questions only the second gets right, `lost` only the first; p is two-sided, 1 if they never differ.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"difference": (gained - lost) / len(pairs), "gained": gained, "lost": lost, "p": float(p)}
