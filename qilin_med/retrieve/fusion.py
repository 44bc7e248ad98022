"""What searches return, and how two of them become one."""

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

Ranking: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Numbers of chunks (int64) and their scores (float32), the best first."""

CONSTANT = 60


def fuse(rankings: Iterable[Ranking], k: int) -> Ranking:
    """Reciprocal rank fusion (Cormack et al., SIGIR 2009): score(d) = sum over rankings of 1 / (60 + rank of d).

    Only ranks count, so scores of different kinds need no common scale. Ties go to the smaller number.
    """
    scores: dict[int, float] = defaultdict(float)
    for numbers, _ in rankings:
        for rank, number in enumerate(numbers.tolist(), 1):
            scores[number] += 1 / (CONSTANT + rank)
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
    return np.array([number for number, _ in best], np.int64), np.array([score for _, score in best], np.float32)


def best_of(numbers: np.ndarray, scores: np.ndarray, k: int) -> Ranking:
    """The k highest scores in order; ties go to the smaller number."""
    if len(numbers) > k:
        kept = np.argpartition(scores, -k)[-k:]
        numbers, scores = numbers[kept], scores[kept]
    order = np.lexsort((numbers, -scores))
    return numbers[order].astype(np.int64), scores[order]
