"""What a model answered, its score, and the scores of a test set, for each task of configs/tasks.

A question's results are what lm-evaluation-harness hands over: one generated text, or (log-probability, is greedy) of
every choice in order.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qilin_med.evaluate.extraction import extract_letters, split_explanation
from qilin_med.evaluate.metrics.statistics import Score, choice_scores, exact_match, mean_of_groups, mean_score
from qilin_med.evaluate.metrics.text import score_text, text_scores
from qilin_med.evaluate.tasks.questions import Row, lettered
from qilin_med.evaluate.tasks.subjects import CATEGORIES, HARD, MEDICAL, SUBJECTS

Results = list[Any]
Sample = dict[str, Any]
"""`answer` (what the model chose or wrote), `gold`, `score` (numbers by name), `facets` (value by name)."""


def chosen_letters(row: Row, results: Results) -> str:
    """The letters that a generated text names ("" if none), or that of the choice with the highest log-probability."""
    if isinstance(results[0], str):
        return extract_letters(results[0], lettered(row))
    return row["letters"][int(np.argmax([log_probability for log_probability, _ in results]))]


def score_letters(row: Row, results: Results) -> dict[str, int]:
    letters = chosen_letters(row, results)
    unparsed = {"unparsed": int(not letters)} if isinstance(results[0], str) else {}
    return {"accuracy": exact_match(letters, row["answer"]), **unparsed}


def score_options(row: Row, results: Results) -> dict[str, int]:
    """By log-probability, and by log-probability per character of the option: long options lose less."""
    lengths = [max(len(text), 1) for text in row["options"]]
    shares = [(result[0] / length, False) for result, length in zip(results, lengths, strict=True)]
    by_character = exact_match(chosen_letters(row, shares), row["answer"])
    return score_letters(row, results) | {"accuracy_per_character": by_character}


def written_text(row: Row, results: Results) -> str:
    """The explanation in the answer to an exam question, or the answer to a consultation."""
    return split_explanation(results[0]) if "explanation" in row else results[0].strip()


def score_writing(row: Row, results: Results) -> dict[str, Any]:
    text = written_text(row, results)
    return {**score_text(text, row.get("explanation", row["answer"])), "empty": int(not text)}


def exam_scores(samples: list[Sample]) -> dict[str, Score]:
    scores = choice_scores([sample["answer"] for sample in samples], [sample["gold"] for sample in samples])
    others = [name for name in samples[0]["score"] if name != "accuracy"]
    return scores | {name: mean_score([sample["score"][name] for sample in samples]) for name in others}


def ceval_scores(samples: list[Sample]) -> dict[str, Score]:
    """Averages over subjects, all and by official category, and the three medical subjects."""
    groups = {"average": SUBJECTS}
    groups |= {f"average_{category.lower().replace(' ', '_')}": names for category, names in CATEGORIES.items()}
    groups |= {"average_hard": HARD, **{subject: [subject] for subject in MEDICAL}}
    scores = {}
    for name, members in groups.items():
        asked = [sample for sample in samples if sample["facets"]["subject"] in members]
        right = [sample["score"]["accuracy"] for sample in asked]
        if asked and name in MEDICAL:
            scores[name] = mean_score(right)
        elif asked:
            scores[name] = mean_of_groups(right, [sample["facets"]["subject"] for sample in asked])
    return scores | exam_scores(samples)


def written_scores(samples: list[Sample]) -> dict[str, Score]:
    return text_scores([sample["score"] for sample in samples])


def accuracy_by_facet(samples: list[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """{facet: {value: accuracy with its interval and questions}}; {} for texts and for test sets without gold answers or
    facets."""
    grouped: dict[tuple[str, str], list[int]] = defaultdict(list)
    for sample in samples:
        for facet in sample["facets"].items() if "accuracy" in sample["score"] else ():
            grouped[facet].append(sample["score"]["accuracy"])
    scores: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, value), right in sorted(grouped.items()):
        scores[name][value] = {**mean_score(right).with_interval(), "questions": len(right)}
    return dict(scores)


class Scoring(NamedTuple):
    """What the task file does not say; it names the function that scores one question."""

    answer: Callable[[Row, Results], str]
    gold: str
    """Column of the right answer."""
    summarise: Callable[[list[Sample]], dict[str, Score]]


TASKS = {
    "cmexam_generate": Scoring(chosen_letters, "answer", exam_scores),
    "cmexam_letters": Scoring(chosen_letters, "answer", exam_scores),
    "cmexam_options": Scoring(chosen_letters, "answer", exam_scores),
    "cmexam_reasoning": Scoring(written_text, "explanation", written_scores),
    "ceval_generate": Scoring(chosen_letters, "answer", ceval_scores),
    "ceval_letters": Scoring(chosen_letters, "answer", ceval_scores),
    "huatuo26m_generate": Scoring(written_text, "answer", written_scores),
}
