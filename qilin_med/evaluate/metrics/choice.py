"""Exam answers: accuracy of the exact letter set and weighted F1, whole and by the questions' facets.

Gold and predicted answers are letters in order, "A" or "BD"; a prediction of "" could not be parsed and is wrong.
"""

from collections.abc import Callable

import numpy as np

from qilin_med.evaluate.metrics.statistics import Score, mean_score

UNPARSED = ""


def exact_match(predicted: str, gold: str) -> int:
    return int(set(predicted) == set(gold))


def accuracy(predicted: list[str], gold: list[str]) -> Score:
    return mean_score([exact_match(p, g) for p, g in zip(predicted, gold, strict=True)])


def weighted_f1(predicted: list[str], gold: list[str]) -> Score:
    """F1 of each letter set as a class, weighted by how often it is the gold answer (as scikit-learn's "weighted")."""
    classes = sorted({*predicted, *gold})
    of_predicted, of_gold = _one_hot(predicted, classes), _one_hot(gold, classes)
    rows = np.concatenate([of_predicted * of_gold, of_predicted, of_gold], axis=1)

    def of_means(means: np.ndarray) -> np.ndarray:
        both, given, wanted = np.split(means, 3, axis=-1)
        f1 = 2 * both / np.maximum(given + wanted, 1e-12)
        return (f1 * wanted).sum(-1) / wanted.sum(-1)

    return Score(rows, of_means)


def _one_hot(answers: list[str], classes: list[str]) -> np.ndarray:
    return np.array([[answer == name for name in classes] for answer in answers], dtype=float)


def mean_of_groups(values: list[float], groups: list[str]) -> Score:
    """The mean over groups (C-Eval: subjects) of each group's mean."""
    members = _one_hot(groups, sorted(set(groups)))
    rows = np.concatenate([members * np.asarray(values, dtype=float)[:, None], members], axis=1)

    def of_means(means: np.ndarray) -> np.ndarray:
        sums, shares = np.split(means, 2, axis=-1)
        # A resample may hold no question of a small group; the mean is then over the others.
        return (sums / np.maximum(shares, 1e-12)).sum(-1) / (shares > 0).sum(-1)

    return Score(rows, of_means)


def choice_scores(predicted: list[str], gold: list[str]) -> dict[str, Score]:
    """Accuracy and weighted F1 of all questions, accuracy of those with one and with several right letters."""
    scores = {"accuracy": accuracy(predicted, gold), "weighted_f1": weighted_f1(predicted, gold)}
    kinds: dict[str, Callable[[str], bool]] = {"single": lambda g: len(g) == 1, "multiple": lambda g: len(g) > 1}
    for name, is_kind in kinds.items():
        pairs = [(p, g) for p, g in zip(predicted, gold, strict=True) if is_kind(g)]
        if pairs and len(pairs) < len(gold):
            scores[f"accuracy_{name}"] = accuracy([p for p, _ in pairs], [g for _, g in pairs])
    return scores
