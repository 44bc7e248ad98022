"""What a model answered, its score, and the scores of a test set.

A question's results are what lm-evaluation-harness hands over: one generated text, or (log-probability, is greedy) of
every choice in order.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from qilin_med.config.experiment import Average
from qilin_med.evaluate.extraction import ceval_answer, extract_letters, first_capitals, split_explanation
from qilin_med.evaluate.metrics.statistics import (
    Score,
    choice_scores,
    exact_match,
    expected_calibration_error,
    mean_of_groups,
    mean_score,
)
from qilin_med.evaluate.metrics.text import score_text, text_scores
from qilin_med.evaluate.tasks.questions import Row, lettered
from qilin_med.prompt.wording import option_lines

Results = list[Any]
Sample = dict[str, Any]
"""`answer` (what the model chose or wrote), `gold`, `score` (numbers by name), `facets` (value by name), `order`
(each option's place in the file by its letter)."""

RULES: dict[str, Callable[[str, Row], str]] = {
    "letters": lambda text, row: extract_letters(text, lettered(row), row["stem"]),
    "first_capitals": lambda text, row: first_capitals(text, lettered(row)),
    "ceval_script": lambda text, row: ceval_answer(text, lettered(row)),
}
MOST_VALUES = 100  # of a facet that is shown: a column with more is a number or a text
FAVOURITE = 0.9  # share of a letter among the answers from which on it says little what was asked


def chosen_letters(row: Row, results: Results) -> str:
    """The letters that a generated text names ("" if none), or that of the choice with the highest log-probability."""
    if isinstance(results[0], str):
        return RULES[row["rule"]](results[0], row)
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
    return split_explanation(results[0]) if row["options"] else results[0].strip()


def score_writing(row: Row, results: Results) -> dict[str, Any]:
    text = written_text(row, results)
    return {**score_text(text, row["explanation"]), "empty": int(not text)}


def make_sample(raw: dict[str, Any]) -> Sample:
    """One question and its answer, from what the harness says of it."""
    row, output = raw["doc"], raw["filtered_resps"]
    is_exam = "accuracy" in raw["metrics"]
    if not isinstance(output[0], str):
        choices = [arguments[1] for arguments in raw["arguments"]]
        told = [[choice, log_prob] for choice, (log_prob, _) in zip(choices, output, strict=True)]
    return {
        "id": row["id"],
        "number": row["number"],
        # As a person reads it: without instructions, examples and passages, with its options.
        "question": "\n".join([row["stem"], *([option_lines(lettered(row))] if row["options"] else [])]),
        "prompt": raw["arguments"][0][0],
        "output": output[0] if isinstance(output[0], str) else told,
        "answer": (chosen_letters if is_exam else written_text)(row, output),
        "gold": row["answer"] if is_exam else row["explanation"],
        "score": {metric: raw[metric] for metric in raw["metrics"]},
        "facets": dict(row["facets"]),
        "sources": row["sources"],
        "cut": row["cut"],
        "order": dict(zip(row["letters"], row["order"], strict=True)),
    }


# --------------------------------------------------------------------------------------------------------- test sets


def summarise(samples: list[Sample], averages: dict[str, dict[str, Any]]) -> dict[str, Score]:
    """All metrics of the questions whose answers are known; `averages` as in the settings of a task (`Average`)."""
    if "accuracy" not in samples[0]["score"]:
        return text_scores([sample["score"] for sample in samples])
    scores = {}
    for name, average in averages.items():
        if score := average_score(samples, Average.model_validate(average)):
            scores[name] = score
    scores |= choice_scores([sample["answer"] for sample in samples], [sample["gold"] for sample in samples])
    others = [name for name in samples[0]["score"] if name != "accuracy"]
    return scores | {name: mean_score([sample["score"][name] for sample in samples]) for name in others}


def average_score(samples: list[Sample], average: Average) -> Score | None:
    """None where no question belongs to it."""
    members = [s for s in samples if all(s["facets"].get(facet) in values for facet, values in average.of.items())]
    right = [sample["score"]["accuracy"] for sample in members]
    if not members:
        return None
    if average.over is None:
        return mean_score(right)
    return mean_of_groups(right, [sample["facets"].get(average.over, "") for sample in members])


def accuracy_by_facet(samples: list[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """{facet: {value: accuracy with its interval and questions}}; {} for texts and for test sets without gold answers or
    facets."""
    grouped: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        for facet, value in sample["facets"].items() if "accuracy" in sample["score"] else ():
            grouped[facet][value].append(sample["score"]["accuracy"])
    return {
        facet: {
            v: {**mean_score(right).with_interval(), "questions": len(right)} for v, right in sorted(values.items())
        }
        for facet, values in grouped.items()
        if 1 < len(values) <= MOST_VALUES
    }


def favourite(samples: list[Sample]) -> dict[str, Any]:
    """The answer that a model gives to nearly every question: {"letter", "share"}, {} if there is none."""
    if "accuracy" not in samples[0]["score"]:
        return {}
    [(letter, count)] = Counter(sample["answer"] for sample in samples).most_common(1)
    return {"letter": letter, "share": count / len(samples)} if letter and count >= FAVOURITE * len(samples) else {}


def calibration(samples: list[Sample]) -> dict[str, Any]:
    """Whether a model is right as often as it is sure, where it chose by likelihood: its confidence is the share of its
    choice in the likelihoods of all choices."""
    if isinstance(samples[0]["output"], str):
        return {}
    log_probs = [np.array([log_prob for _, log_prob in sample["output"]]) for sample in samples]
    confidences = [float(1 / np.exp(values - values.max()).sum()) for values in log_probs]
    return expected_calibration_error(confidences, [sample["score"]["accuracy"] for sample in samples])
