"""What a model answered, its score, and the scores of a test set, for each task of configs/tasks.

A question's results are what lm-evaluation-harness hands over: one generated text, or (log-probability, is greedy) of
every choice in order.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qilin_med.evaluate.extraction import extract_letters, split_explanation
from qilin_med.evaluate.metrics.choice import UNPARSED, accuracy, choice_scores, exact_match, mean_of_groups
from qilin_med.evaluate.metrics.statistics import Score, mean_score
from qilin_med.evaluate.metrics.text import score_text, text_scores
from qilin_med.evaluate.tasks.subjects import CATEGORIES, HARD, MEDICAL
from qilin_med.evaluate.tasks.wording import Row, answer, explanation, lettered

Results = list[Any]
Sample = dict[str, Any]
"""`answer` (what the model chose or wrote), `gold`, `score` (numbers by name), `facets` (value by name)."""


@dataclass(frozen=True)
class Scoring:
    """Beside the task file, which names the function that scores one question."""

    answer: Callable[[Row, Results], str]
    gold: Callable[[Row], str]
    facets: Callable[[Row], dict[str, str]]
    summarise: Callable[[list[Sample]], dict[str, Score]]


# ------------------------------------------------------------------------------------------------------- letters


def generated_letters(row: Row, results: Results) -> str:
    return extract_letters(results[0], lettered(row))


def likeliest_letter(row: Row, results: Results) -> str:
    """The letter of the choice with the highest summed log-probability."""
    return row["letters"][int(np.argmax([log_probability for log_probability, _ in results]))]


def likeliest_letter_per_character(row: Row, results: Results) -> str:
    """As `likeliest_letter`, by log-probability per character of the option: long options lose less."""
    lengths = [max(len(text), 1) for text in row["options"]]
    return row["letters"][int(np.argmax([r[0] / length for r, length in zip(results, lengths, strict=True)]))]


def score_generated_letters(row: Row, results: Results) -> dict[str, int]:
    letters = generated_letters(row, results)
    return {"accuracy": exact_match(letters, row["answer"]), "unparsed": int(letters == UNPARSED)}


def score_likely_letter(row: Row, results: Results) -> dict[str, int]:
    return {"accuracy": exact_match(likeliest_letter(row, results), row["answer"])}


def score_likely_option(row: Row, results: Results) -> dict[str, int]:
    per_character = likeliest_letter_per_character(row, results)
    return {**score_likely_letter(row, results), "accuracy_per_character": exact_match(per_character, row["answer"])}


def exam_facets(row: Row) -> dict[str, str]:
    return dict(row["facets"])


def exam_scores(samples: list[Sample]) -> dict[str, Score]:
    scores = choice_scores([sample["answer"] for sample in samples], [sample["gold"] for sample in samples])
    others = [name for name in samples[0]["score"] if name != "accuracy"]
    return scores | {name: mean_score([sample["score"][name] for sample in samples]) for name in others}


# -------------------------------------------------------------------------------------------------------- C-Eval


def ceval_facets(row: Row) -> dict[str, str]:
    return {"subject": row["subject"], "category": row["category"]}


def ceval_scores(samples: list[Sample]) -> dict[str, Score]:
    """Averages over subjects, all and by official category, and the three medical subjects."""
    scores = {"average": _subject_average(samples)}
    for category in CATEGORIES:
        if chosen := [sample for sample in samples if sample["facets"]["category"] == category]:
            scores[f"average_{category.lower().replace(' ', '_')}"] = _subject_average(chosen)
    if hard := [sample for sample in samples if sample["facets"]["subject"] in HARD]:
        scores["average_hard"] = _subject_average(hard)
    for subject in MEDICAL:
        if chosen := [sample for sample in samples if sample["facets"]["subject"] == subject]:
            scores[subject] = mean_score([sample["score"]["accuracy"] for sample in chosen])
    return scores | exam_scores(samples)


def _subject_average(samples: list[Sample]) -> Score:
    values = [sample["score"]["accuracy"] for sample in samples]
    return mean_of_groups(values, [sample["facets"]["subject"] for sample in samples])


def submission(samples: list[Sample]) -> dict[str, dict[str, str]]:
    """C-Eval's official form: {subject: {id: letter}}; a question that got no letter has ""."""
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in samples:
        answers[sample["facets"]["subject"]][str(sample["number"])] = sample["answer"]
    return {subject: answers[subject] for subject in sorted(answers)}


# --------------------------------------------------------------------------------------------------------- texts


def written_explanation(_: Row, results: Results) -> str:
    return split_explanation(results[0])


def written_answer(_: Row, results: Results) -> str:
    return results[0].strip()


def score_explanation(row: Row, results: Results) -> dict[str, Any]:
    return _with_empty(written_explanation(row, results), row["explanation"])


def score_answer(row: Row, results: Results) -> dict[str, Any]:
    return _with_empty(written_answer(row, results), row["answer"])


def _with_empty(text: str, reference: str) -> dict[str, Any]:
    return {**score_text(text, reference), "empty": int(not text)}


def written_scores(samples: list[Sample]) -> dict[str, Score]:
    rows = [sample["score"] for sample in samples]
    return text_scores(rows) | {"empty": mean_score([row["empty"] for row in rows])}


def accuracy_by_facet(samples: list[Sample]) -> dict[str, dict[str, Score]]:
    """{facet: {value: accuracy}}; {} for texts and for test sets without gold answers or facets."""
    grouped: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if "accuracy" in sample["score"]:
            for name, value in sample["facets"].items():
                grouped[name][value].append(sample)
    return {
        name: {value: accuracy([s["answer"] for s in group], [s["gold"] for s in group]) for value, group in
               sorted(groups.items())}
        for name, groups in sorted(grouped.items())
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- tasks


def no_facets(_: Row) -> dict[str, str]:
    return {}


TASKS: dict[str, Scoring] = {
    "cmexam_generate": Scoring(generated_letters, answer, exam_facets, exam_scores),
    "cmexam_letters": Scoring(likeliest_letter, answer, exam_facets, exam_scores),
    "cmexam_options": Scoring(likeliest_letter, answer, exam_facets, exam_scores),
    "cmexam_reasoning": Scoring(written_explanation, explanation, exam_facets, written_scores),
    "ceval_generate": Scoring(generated_letters, answer, ceval_facets, ceval_scores),
    "ceval_letters": Scoring(likeliest_letter, answer, ceval_facets, ceval_scores),
    "huatuo26m_generate": Scoring(written_answer, answer, no_facets, written_scores),
}
