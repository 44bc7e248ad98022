"""Did a stage help? Paired tests between neighbouring models on the same questions of each task."""

import json
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
    SAMPLES,
    WITHOUT_EXAMS,
    model_folders,
    read_results,
    read_samples,
)
from qilin_med.evaluate.tasks.scoring import TASKS, Sample

MCNEMAR = "McNemar, exact"


def compare_models(experiment: Experiment) -> list[dict[str, Any]]:
    """Compare what lies in runs/<name>/eval, and write comparisons.json there.

    One entry for each task and neighbouring pair of the models that have it, and for each model with and without
    retrieval: {"task", "first", "second", "questions", "metrics": {metric: test}}. The held-out preference pairs are the
    task "heldout".
    """
    folder = Path(experiment.output_dir) / "eval"
    found = [*_compare_preferences(read_results(experiment))]
    found += [
        {"task": task, "first": first, "second": second, **compare_samples(*files)}
        for task, first, second, files in _pairs(folder, list(model_folders(experiment)))
    ]
    if folder.is_dir():
        write_json(folder / "comparisons.json", found)
    return found


def _pairs(folder: Path, models: list[str]) -> Iterator[tuple[str, str, str, tuple[Path, Path]]]:
    """(task, first, second, their samples) of all that can be compared."""
    for file in sorted({path.name for path in folder.glob(f"*/*{SAMPLES}")}):
        task = file.removesuffix(SAMPLES)
        holders = [name for name in models if (folder / name / file).exists()]
        for first, second in pairwise(holders):
            yield task, first, second, (folder / first / file, folder / second / file)
        ending = next((ending for ending in (RETRIEVAL, WITHOUT_EXAMS) if task.endswith(ending)), "")
        plain = f"{task.removesuffix(ending)}{SAMPLES}"
        for name in holders if ending else []:
            if (folder / name / plain).exists():
                yield task, name, f"{name} with retrieval", (folder / name / plain, folder / name / file)


def _compare_preferences(results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """McNemar's test on the pairs whose chosen answer is the likelier one."""
    measure = "preference accuracy"
    right = {
        name: (result["rows"][measure], [int(margin > 0) for margin in result["measures"][measure]["margins"]])
        for name, result in results.items()
        if measure in result["measures"]
    }
    for (first, (rows, before)), (second, (same, after)) in pairwise(right.items()):
        if rows == same:
            tests = {measure: {"test": MCNEMAR, **mcnemar(before, after)}}
            yield {"task": HELD_OUT, "first": first, "second": second, "questions": len(after), "metrics": tests}


def compare_samples(first: Path, second: Path) -> dict[str, Any]:
    """Tests of second against first, on the questions that both were asked and whose answers are known."""
    summarise = TASKS[_task_of(first)].summarise
    pairs = [{s["id"]: s for s in read_samples(path) if s["gold"]} for path in (first, second)]
    shared = [question for question in pairs[0] if _is_same(pairs[0][question], pairs[1].get(question))]
    if not shared:
        return {"questions": 0, "metrics": {}}
    scores = [summarise([samples[question] for question in shared]) for samples in pairs]
    return {
        "questions": len(shared),
        "metrics": {metric: compare_scores(scores[0][metric], scores[1][metric]) for metric in scores[0]},
    }


def compare_scores(first: Score, second: Score) -> dict[str, Any]:
    """McNemar's exact test for 0/1 scores, else the paired bootstrap."""
    if all(score.rows.shape[1] == 1 and np.isin(score.rows, (0, 1)).all() for score in (first, second)):
        return {"test": MCNEMAR} | mcnemar(*(score.rows[:, 0].astype(int).tolist() for score in (first, second)))
    return {"test": "paired bootstrap"} | paired_bootstrap(first, second)


def _task_of(samples: Path) -> str:
    result = samples.with_name(samples.name.replace(SAMPLES, ".json"))
    return json.loads(result.read_text(encoding="utf-8"))["task"]


def _is_same(first: Sample, second: Sample | None) -> bool:
    return second is not None and first["gold"] == second["gold"]
