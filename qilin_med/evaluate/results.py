"""What a run wrote, read back without loading a library that computes: models, measures, samples, metrics."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import STAGES, Experiment
from qilin_med.errors import UserError

HELD_OUT = "heldout"  # name of the held-out measures among the results
SAMPLES = ".samples.jsonl"
RETRIEVAL = "_retrieval"  # ends the names of results with passages before each question
WITHOUT_EXAMS = f"{RETRIEVAL}_without_exams"


def model_folders(experiment: Experiment) -> dict[str, Path]:
    """Base and stages of an experiment by name, in order."""
    stages = {name: experiment.stage_folder(name) / "merged" for name in STAGES if getattr(experiment, name)}
    return {"base": Path(experiment.model.path), **stages}


def existing_models(experiment: Experiment, names: list[str] | None = None) -> dict[str, Path]:
    """The named (None: all) of `model_folders`; UserError: a name is unknown, or its folder is not there."""
    folders = model_folders(experiment)
    names = names or list(folders)
    if unknown := [name for name in names if name not in folders]:
        raise UserError(f"unknown model '{unknown[0]}'; this experiment has {', '.join(folders)}")
    if missing := [name for name in names if not folders[name].is_dir()]:
        raise UserError(
            f"{missing[0]}: {folders[missing[0]]} does not exist; run its stage first, or name other models"
        )
    return {name: folders[name] for name in names}


def result_file(experiment: Experiment, model: str) -> Path:
    """Where a model's held-out measures lie."""
    return Path(experiment.output_dir) / "eval" / model / f"{HELD_OUT}.json"


def read_results(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Held-out measures by model name, in order, as far as they are there."""
    files = {name: result_file(experiment, name) for name in model_folders(experiment)}
    return {name: read_json(path) for name, path in files.items() if path.exists()}


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
