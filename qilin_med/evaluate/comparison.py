"""Did a stage help? Paired tests between neighbouring models on the same questions of each task."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qilin_med.artifact import write_json
from qilin_med.config.experiment import Experiment
from qilin_med.evaluate.metrics.statistics import Score, mcnemar, mean_score, paired_bootstrap
from qilin_med.evaluate.results import HELD_OUT, RETRIEVAL, WITHOUT_EXAMS, read_results, read_samples, result_folder
from qilin_med.evaluate.tasks.scoring import summarise

PREFERENCES = "preference accuracy"


def compare_models(experiment: Experiment) -> list[dict[str, Any]]:
    """Compare what lies in runs/<name>/eval, and write comparisons.json there.

    One entry for each task and neighbouring pair of the models that have it, and for each model with and without
    retrieval: {"task", "first", "second", "questions", "metrics": {metric: test}}. The held-out preference pairs are the
    task "heldout".
    """
    results, found = read_results(experiment), []
    held_out = {model: sets[HELD_OUT] for model, sets in results.items() if HELD_OUT in sets}
    measured = [(model, result) for model, result in held_out.items() if PREFERENCES in result["measures"]]
    for (first, before), (second, after) in pairwise(measured):
        if before["rows"][PREFERENCES] == after["rows"][PREFERENCES]:
            margins = [result["measures"][PREFERENCES]["margins"] for result in (before, after)]
            scores = [mean_score([margin > 0 for margin in of_model]) for of_model in margins]
            tests = {"questions": len(margins[0]), "metrics": {PREFERENCES: compare_scores(*scores)}}
            found.append({"task": HELD_OUT, "first": first, "second": second, **tests})
    for task in sorted({name for sets in results.values() for name in sets} - {HELD_OUT}):
        holders = [model for model, sets in results.items() if task in sets]
        pairs = [(first, second, (first, task), (second, task)) for first, second in pairwise(holders)]
        if ending := next((ending for ending in (WITHOUT_EXAMS, RETRIEVAL) if task.endswith(ending)), ""):
            plain = task.removesuffix(ending)
            asked = [model for model in holders if plain in results[model]]
            pairs += [(model, f"{model} with retrieval", (model, plain), (model, task)) for model in asked]
        for first, second, *places in pairs:
            folders = [result_folder(experiment, *place) for place in places]
            tests = compare_samples(*folders, averages_of(results[holders[0]][task]))
            found.append({"task": task, "first": first, "second": second, **tests})
    if (folder := Path(experiment.output_dir) / "eval").is_dir():
        write_json(folder / "comparisons.json", found)
    return found


def averages_of(result: dict[str, Any]) -> dict[str, Any]:
    """The averages that a result's task names; results of earlier versions tell none."""
    return result.get("questions", {}).get("averages", {})


def compare_samples(first: Path, second: Path, averages: dict[str, Any]) -> dict[str, Any]:
    """Tests of second against first, on the questions that both were asked and whose answers are known; `averages` as in
    the task's settings."""
    before, after = ({s["id"]: s for s in read_samples(folder) if s["gold"]} for folder in (first, second))
    shared = [key for key, sample in before.items() if key in after and after[key]["gold"] == sample["gold"]]
    if not shared:
        return {"questions": 0, "metrics": {}}
    old, new = (summarise([samples[question] for question in shared], averages) for samples in (before, after))
    return {"questions": len(shared), "metrics": {name: compare_scores(old[name], new[name]) for name in old}}


def compare_scores(first: Score, second: Score) -> dict[str, Any]:
    """McNemar's exact test for 0/1 scores, else the paired bootstrap."""
    if all(score.rows.shape[1] == 1 and np.isin(score.rows, (0, 1)).all() for score in (first, second)):
        right = (score.rows[:, 0].astype(int).tolist() for score in (first, second))
        return {"test": "McNemar, exact"} | mcnemar(*right)
    return {"test": "paired bootstrap"} | paired_bootstrap(first, second)
