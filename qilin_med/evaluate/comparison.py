"""Did a stage help? Paired tests between neighbouring models on the same questions of each task."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qilin_med.artifact import write_json
from qilin_med.config.experiment import Experiment
from qilin_med.evaluate.metrics.statistics import Score, mcnemar, paired_bootstrap
from qilin_med.evaluate.results import (
    HELD_OUT,
    RETRIEVAL,
    WITHOUT_EXAMS,
    read_results,
    read_samples,
    result_folder,
)
from qilin_med.evaluate.tasks.scoring import TASKS

MCNEMAR = "McNemar, exact"
Results = dict[str, dict[str, dict[str, Any]]]
"""{model: {set of questions: result}}"""


def compare_models(experiment: Experiment) -> list[dict[str, Any]]:
    """Compare what lies in runs/<name>/eval, and write comparisons.json there.

    One entry for each task and neighbouring pair of the models that have it, and for each model with and without
    retrieval: {"task", "first", "second", "questions", "metrics": {metric: test}}. The held-out preference pairs are the
    task "heldout".
    """
    results = read_results(experiment)
    found = [*_compare_preferences({model: sets[HELD_OUT] for model, sets in results.items() if HELD_OUT in sets})]
    for task, first, second, (model, plain), (other, name) in _pairs(results):
        folders = result_folder(experiment, model, plain), result_folder(experiment, other, name)
        tests = compare_samples(results[other][name]["task"], *folders)
        found.append({"task": task, "first": first, "second": second, **tests})
    folder = Path(experiment.output_dir) / "eval"
    if folder.is_dir():
        write_json(folder / "comparisons.json", found)
    return found


def _pairs(results: Results) -> Iterator[tuple[str, str, str, tuple[str, str], tuple[str, str]]]:
    """(task, first, second, (model, set) of the first, (model, set) of the second) of all that can be compared."""
    for task in sorted({name for sets in results.values() for name in sets if name != HELD_OUT}):
        holders = [model for model, sets in results.items() if task in sets]
        for first, second in pairwise(holders):
            yield task, first, second, (first, task), (second, task)
        ending = next((ending for ending in (WITHOUT_EXAMS, RETRIEVAL) if task.endswith(ending)), "")
        plain = task.removesuffix(ending)
        for model in holders if ending else []:
            if plain in results[model]:
                yield task, model, f"{model} with retrieval", (model, plain), (model, task)


def _compare_preferences(held_out: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """McNemar's test on the pairs whose chosen answer is more likely."""
    measure = "preference accuracy"
    right = {
        name: (result["rows"][measure], [int(margin > 0) for margin in result["measures"][measure]["margins"]])
        for name, result in held_out.items()
        if measure in result["measures"]
    }
    for (first, (rows, before)), (second, (same, after)) in pairwise(right.items()):
        if rows == same:
            tests = {measure: {"test": MCNEMAR, **mcnemar(before, after)}}
            yield {"task": HELD_OUT, "first": first, "second": second, "questions": len(after), "metrics": tests}


def compare_samples(task: str, first: Path, second: Path) -> dict[str, Any]:
    """Tests of second against first, on the questions that both were asked and whose answers are known."""
    before, after = ({s["id"]: s for s in read_samples(folder) if s["gold"]} for folder in (first, second))
    shared = [key for key, sample in before.items() if key in after and after[key]["gold"] == sample["gold"]]
    if not shared:
        return {"questions": 0, "metrics": {}}
    scores = [TASKS[task].summarise([samples[question] for question in shared]) for samples in (before, after)]
    return {
        "questions": len(shared),
        "metrics": {metric: compare_scores(scores[0][metric], scores[1][metric]) for metric in scores[0]},
    }


def compare_scores(first: Score, second: Score) -> dict[str, Any]:
    """McNemar's exact test for 0/1 scores, else the paired bootstrap."""
    if all(score.rows.shape[1] == 1 and np.isin(score.rows, (0, 1)).all() for score in (first, second)):
        return {"test": MCNEMAR} | mcnemar(*(score.rows[:, 0].astype(int).tolist() for score in (first, second)))
    return {"test": "paired bootstrap"} | paired_bootstrap(first, second)
