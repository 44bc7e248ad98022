"""Scores with their uncertainty: Wilson's intervals for shares of questions, seeded bootstrap intervals for all else, paired
tests between two models on the same questions, and calibration.

A score is a function of the mean of its rows' statistics (accuracy: of one number per row; BLEU: of counts), so that one
bootstrap serves all of them.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 1000
SEED = 12345
_AT_ONCE = 100  # resamples computed together: bounds the memory for large test sets


class Score(NamedTuple):
    """`rows` [questions, statistics] and the function that turns means [..., statistics] into scores [...]."""

    rows: np.ndarray
    of_means: Callable[[np.ndarray], np.ndarray]

    def value(self) -> float:
        return float(self.of_means(self.rows.mean(axis=0)))

    def interval(self) -> tuple[float, float]:
        """Of 95%: Wilson's (1927) for one 0/1 a question, since a bootstrap of all or nothing right is a point."""
        questions, columns = self.rows.shape
        if columns == 1 and np.isin(self.rows, (0, 1)).all():
            low, high = binomtest(int(self.rows.sum()), questions).proportion_ci(method="wilson")
            return float(low), float(high)
        return bootstrap_interval(self)

    def with_interval(self) -> dict[str, float]:
        low, high = self.interval()
        return {"value": self.value(), "low": low, "high": high}


def mean_score(values: list[float]) -> Score:
    """The plain mean of one number per question."""
    return Score(np.asarray(values, dtype=float)[:, None], lambda means: means[..., 0])


def bootstrap_interval(score: Score, level: float = 0.95, seed: int = SEED) -> tuple[float, float]:
    """Percentile interval of a score over resampled questions (Efron and Tibshirani 1993, chapter 13)."""
    return _interval(_resample(score, seed), level)


def _interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    tail = 50 * (1 - level)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def paired_bootstrap(first: Score, second: Score) -> dict[str, float]:
    """Difference second - first on the same questions in the same order: value, interval and two-sided p-value.

    p is the share of resampled differences that lie as far from their own mean as the observed difference from 0, with
    one added to both counts (Riezler and Maxwell 2005; sacrebleu's paired test).
    """
    if len(first.rows) != len(second.rows):
        raise ValueError(f"paired scores need the same questions: found {len(first.rows)} and {len(second.rows)}")
    differences, observed = _resample(second) - _resample(first), second.value() - first.value()
    # Sums of the same values in another order differ in their last bits.
    as_far = int((np.abs(differences - differences.mean()) >= abs(observed) - 1e-12).sum())
    low, high = _interval(differences)
    return {"difference": observed, "low": low, "high": high, "p": (as_far + 1) / (RESAMPLES + 1)}


def mcnemar(first: list[int], second: list[int]) -> dict[str, float]:
    """Exact McNemar test of two models' 0/1 scores on the same questions (McNemar 1947, with the binomial distribution).

    `gained` questions only the second gets right, `lost` only the first; p is two-sided, 1 if they never differ.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"difference": (gained - lost) / len(pairs), "gained": gained, "lost": lost, "p": float(p)}


def expected_calibration_error(
    confidences: Sequence[float], right: Sequence[int], bins: int = 10
) -> dict[str, float | list[dict[str, float]]]:
    """How far confidence is from accuracy (Guo et al. 2017): "ece", the mean distance over `bins` of equal width, each
    weighed by its questions; "bins", those that hold questions. An edge belongs to the bin below it."""
    confidences, right = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    numbers = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidences)
    table = []
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        means = {"confidence": float(confidences[inside].mean()), "accuracy": float(right[inside].mean())}
        table.append({"low": number / bins, "high": (number + 1) / bins, **means, "questions": int(inside.sum())})
    distances = [row["questions"] * abs(row["confidence"] - row["accuracy"]) for row in table]
    return {"ece": sum(distances) / len(confidences), "bins": table}


def _resample(score: Score, seed: int = SEED) -> np.ndarray:
    """The score of every resample [RESAMPLES] of as many questions, drawn with replacement."""
    questions = len(score.rows)
    parts = np.split(_draw(questions, seed), RESAMPLES // _AT_ONCE)
    return np.concatenate([score.of_means(counts / questions @ score.rows) for counts in parts])


@lru_cache(maxsize=2)  # all scores of a test set are resampled alike
def _draw(questions: int, seed: int) -> np.ndarray:
    """How often each question is drawn, [resamples, questions]."""
    random = np.random.default_rng(seed)
    draws = (random.integers(questions, size=(_AT_ONCE, questions)) for _ in range(RESAMPLES // _AT_ONCE))
    return np.array([np.bincount(row, minlength=questions).astype(np.uint8) for draw in draws for row in draw])


# -------------------------------------------------------------------------------------------------- exam answers


def exact_match(predicted: str, gold: str) -> int:
    """Letters count as sets; "" is an answer that could not be parsed."""
    return int(set(predicted) == set(gold))


def accuracy(predicted: list[str], gold: list[str]) -> Score:
    return mean_score([exact_match(p, g) for p, g in zip(predicted, gold, strict=True)])


def weighted_f1(predicted: list[str], gold: list[str]) -> Score:
    """F1 of each letter set as a class, weighted by how often it is the gold answer (as scikit-learn's "weighted")."""
    classes = sorted({*predicted, *gold})
    of_predicted, of_gold = _one_hot(predicted, classes), _one_hot(gold, classes)

    def of_means(means: np.ndarray) -> np.ndarray:
        both, given, wanted = np.split(means, 3, axis=-1)
        f1 = 2 * both / np.maximum(given + wanted, 1e-12)
        return (f1 * wanted).sum(-1) / wanted.sum(-1)

    return Score(np.concatenate([of_predicted * of_gold, of_predicted, of_gold], axis=1), of_means)


def mean_of_groups(values: list[float], groups: list[str]) -> Score:
    """The mean over groups (C-Eval: subjects) of each group's mean."""
    members = _one_hot(groups, sorted(set(groups)))

    def of_means(means: np.ndarray) -> np.ndarray:
        sums, shares = np.split(means, 2, axis=-1)
        # A resample may hold no question of a small group; the mean is then over the others.
        return (sums / np.maximum(shares, 1e-12)).sum(-1) / (shares > 0).sum(-1)

    return Score(np.concatenate([members * np.asarray(values, dtype=float)[:, None], members], axis=1), of_means)


def _one_hot(answers: list[str], classes: list[str]) -> np.ndarray:
    return np.array([[answer == name for name in classes] for answer in answers], dtype=float)


def choice_scores(predicted: list[str], gold: list[str]) -> dict[str, Score]:
    """Accuracy and weighted F1 of all questions, accuracy of those with one and with several right letters."""
    scores = {"accuracy": accuracy(predicted, gold), "weighted_f1": weighted_f1(predicted, gold)}
    for kind in ("single", "multiple"):
        pairs = [(p, g) for p, g in zip(predicted, gold, strict=True) if (len(g) > 1) == (kind == "multiple")]
        if 0 < len(pairs) < len(gold):
            scores[f"accuracy_{kind}"] = accuracy(*zip(*pairs, strict=True))
    return scores
