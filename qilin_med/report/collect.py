"""The files of a run, read for its report; what is missing is left out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qilin_med.artifact import MANIFEST, read_manifest
from qilin_med.config.experiment import STAGES, Experiment
from qilin_med.errors import UserError
from qilin_med.evaluate.results import (
    HELD_OUT,
    RETRIEVAL,
    model_folders,
    read_json,
    read_results,
    read_samples,
    result_folder,
)
from qilin_med.train.metrics import read_metrics

LABELS = {"base": "base", "pretraining": "CPT", "sft": "SFT", "dpo": "DPO"}
_HEADLINES = ("average", "accuracy", "rougeL_char")  # only C-Eval has an average, over subjects


@dataclass(frozen=True, eq=False)
class Result:
    """What one model scored on one set of questions."""

    model: str
    name: str
    folder: Path
    contents: dict[str, Any]

    @property
    def task(self) -> str:
        return self.contents["task"]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return self.contents["metrics"]

    @property
    def headline(self) -> str | None:
        """The metric that stands for all; None where no answer is known."""
        return next((name for name in _HEADLINES if name in self.metrics), None)

    @property
    def set(self) -> str:
        """Name of the questions, the same with and without retrieval."""
        return self.name.partition(RETRIEVAL)[0] if self.contents["retrieval"] else self.name

    @property
    def variant(self) -> str:
        """ "" or, for example, " with retrieval without exams"."""
        words = self.name.removeprefix(self.set).strip("_").replace("_", " ")
        return f" with {words}" if words else ""

    @property
    def label(self) -> str:
        return LABELS[self.model] + self.variant

    @property
    def questions(self) -> int:
        return self.contents["counts"]["questions"] - self.contents["counts"]["without_gold"]

    def samples(self) -> dict[str, dict[str, Any]]:
        """By the question's id, in order."""
        return {sample["id"]: sample for sample in read_samples(self.folder)}


@dataclass(frozen=True)
class Run:
    """All of it by model or stage name, in order."""

    experiment: Experiment
    folder: Path
    models: dict[str, Path]
    manifests: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    held_out: dict[str, dict[str, Any]]
    results: list[Result]
    comparisons: list[dict[str, Any]]
    corpus: dict[str, Any] | None
    """Manifest of the corpus build that the first stage with one was trained on."""

    def settings(self) -> dict[str, Any]:
        """The experiment with each finished stage as it was trained, not as the file may say now."""
        trained = {stage: manifest["experiment"][stage] for stage, manifest in self.manifests.items()}
        return self.experiment.model_dump(mode="json") | trained

    def ranks(self) -> dict[str, int]:
        """How many trained each finished stage."""
        return {stage: manifest["ranks"] for stage, manifest in self.manifests.items()}

    def sets(self) -> list[str]:
        """Names of the sets of questions."""
        return list(dict.fromkeys(result.set for result in self.results))

    def test(self, name: str, model: str, retrieval: bool = False) -> dict[str, Any] | None:
        """The comparison of a model with the one before it, or of its answers with retrieval to those without."""
        for entry in self.comparisons:
            is_with_itself = entry["second"] not in self.models
            subject = entry["first"] if is_with_itself else entry["second"]
            if (entry["task"], subject, is_with_itself) == (name, model, retrieval):
                return entry
        return None

    def outdated(self) -> list[str]:
        """Results of a model that was made again since: "sft cmexam_options"."""
        measured = [(r.model, r.name, r.contents) for r in self.results]
        measured += [(model, HELD_OUT, contents) for model, contents in self.held_out.items()]
        return [
            f"{model} {name}"
            for model, name, contents in measured
            if model in self.manifests and contents["model"]["fingerprint"] != self.manifests[model]["fingerprint"]
        ]


def collect_run(experiment: Experiment) -> Run:
    """Read a run folder. UserError: it holds neither a finished stage nor a result."""
    folder, models = Path(experiment.output_dir), model_folders(experiment)
    stages = [stage for stage in STAGES if stage in models]
    manifests = {stage: read_manifest(models[stage]) for stage in stages if (models[stage] / MANIFEST).exists()}
    logs = {stage: experiment.stage_folder(stage) / "metrics.jsonl" for stage in stages}
    comparisons, measured = folder / "eval/comparisons.json", read_results(experiment)
    run = Run(
        experiment=experiment,
        folder=folder,
        models=models,
        manifests=manifests,
        metrics={stage: rows for stage, path in logs.items() if path.exists() and (rows := read_metrics(path))},
        held_out={model: sets[HELD_OUT] for model, sets in measured.items() if HELD_OUT in sets},
        results=[
            Result(model, name, result_folder(experiment, model, name), contents)
            for model, sets in measured.items()
            for name, contents in sets.items()
            if name != HELD_OUT
        ],
        comparisons=read_json(comparisons) if comparisons.exists() else [],
        corpus=_find_corpus(experiment, stages),
    )
    if not (run.manifests or run.held_out or run.results):
        raise UserError(f"{folder}: no finished stage and no results; run a stage and scripts/evaluate.py first")
    return run


def _find_corpus(experiment: Experiment, stages: list[str]) -> dict[str, Any] | None:
    """A build (scripts/build_chimed.py) has its manifest beside the folders of its stages."""
    sources = [Path(source.path) for stage in stages for source in experiment.stage(stage).data]
    manifests = [source.parent / "manifest.json" for source in sources]
    found = [contents for path in manifests if path.exists() and "sources" in (contents := read_json(path))]
    return found[0] if found else None
