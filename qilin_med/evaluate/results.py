"""Results of a run's models, written, and read back without a library that computes.

A result is a folder runs/<name>/eval/<model>/<set of questions>: result.json has the scores, samples.jsonl every answer,
MANIFEST.json what they were made from. Held-out measures are the set "heldout".
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qilin_med.artifact import MANIFEST, Artifact, read_manifest, write_json, written_whole
from qilin_med.config.experiment import STAGES, Experiment
from qilin_med.errors import UserError

HELD_OUT = "heldout"
RETRIEVAL = "_retrieval"  # ends the names of results with passages before each question
PROTOCOLS = "protocols"  # folder of what evaluation.protocols asks
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


def result_folder(experiment: Experiment, model: str, name: str) -> Path:
    return Path(experiment.output_dir) / "eval" / model / name


def write_result(artifact: Artifact, scores: dict[str, Any], samples: list[dict[str, Any]] = ()) -> dict[str, Any]:
    """Make the result that `artifact` stands for, and read it back; one of other inputs is moved aside."""
    artifact.finished(restart=True, remedy="")
    with artifact.building() as out:
        write_json(out / "result.json", scores)
        if samples:
            with written_whole(out / "samples.jsonl") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False).encode() + b"\n" for sample in samples)
    return read_result(artifact.folder)


def read_result(folder: Path) -> dict[str, Any]:
    """Scores together with what they were made from, and with which libraries. UserError: the manifest is damaged."""
    manifest = read_manifest(folder)
    made_with = {key: manifest.get(key) for key in ("versions", "commit", "experiment", "overrides")}
    return {**manifest["inputs"], **read_json(folder / "result.json"), **made_with}


def read_results(experiment: Experiment) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {set of questions: `read_result`}} of what is there, models in order, sets by name."""
    results = {}
    for model in model_folders(experiment):
        folders = [path.parent for path in sorted(result_folder(experiment, model, "").glob(f"*/{MANIFEST}"))]
        # Not those that were moved aside.
        results[model] = {folder.name: read_result(folder) for folder in folders if ".replaced-" not in folder.name}
    return results


def read_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """The answers of a result, in the order of the questions; none for held-out measures."""
    if (path := folder / "samples.jsonl").exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
