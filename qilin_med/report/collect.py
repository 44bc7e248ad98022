"""The files of a run, read for its report; what is missing is left out."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qilin_med.artifact import MANIFEST, read_manifest
from qilin_med.config.experiment import STAGES, Experiment
from qilin_med.errors import UserError
from qilin_med.evaluate.results import (
    HELD_OUT,
    PROTOCOLS,
    RETRIEVAL,
    model_folders,
    read_json,
    read_results,
    result_folder,
)
from qilin_med.train.metrics import read_metrics

LABELS = {"base": "base", "pretraining": "CPT", "sft": "SFT", "dpo": "DPO"}
HEADLINES = ("average", "accuracy", "rougeL_char")  # only C-Eval has an average, over subjects
# A set that is not a published one is called by what its task asks for, or by its key where the user gave it one.
_KINDS = {"cmexam": "exam", "ceval": "exam in subjects", "huatuo26m": "consultations"}
_WAYS = {"letters": "by letters", "options": "by options", "generate": "by generation", "text": "as text"}
# Words of earlier versions that manifests may have.
_RENAMED = {
    "set_aside": "skipped", "rows_set_aside": "rows_skipped", "dropped": "rejected", "updates": "optimizer_steps",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Result:
    """What one model scored on one set of questions."""

    model: str
    name: str
    set: str
    """Name of the questions, the same with and without retrieval."""
    title: str
    """The set as a person says it, for example "C-Eval test by letters"."""
    origin: str
    """The published set that it is, or "invented", or "not known as a published set"."""
    label: str
    """The model and how passages were found for it, for example "SFT + retrieval without exams"."""
    headline: str | None
    """The metric that stands for all; None where no answer is known."""
    questions: int
    """Those whose answer is known."""
    contents: dict[str, Any]
    """As `evaluate.results.read_result`."""

    @property
    def has_retrieval(self) -> bool:
        return self.set != self.name


@dataclass(frozen=True)
class Run:
    """All of it by model or stage name, in order."""

    experiment: Experiment
    models: dict[str, Path]
    manifests: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]
    held_out: dict[str, dict[str, Any]]
    results: list[Result]
    protocols: dict[str, dict[str, Any]]
    """By entry of evaluation.protocols and model, as `evaluate.protocols.summarise_protocols` wrote them."""
    comparisons: dict[tuple[str, str, bool], dict[str, Any]]
    """By task, model, and whether its answers with retrieval are compared with those without, not with the model before."""
    corpus: dict[str, Any] | None
    """Manifest of the corpus build that the first stage with one was trained on."""
    settings: dict[str, Any]
    """The experiment with each finished stage as it was trained, not as the file may say now."""
    ranks: dict[str, int]
    """How many trained each finished stage."""

    @property
    def is_invented(self) -> bool:
        return any(result.origin == "invented" for result in self.results)

    @property
    def outdated(self) -> list[str]:
        """Results of a model that was made again since: "sft cmexam_options"."""
        measured = [(r.model, r.name, r.contents) for r in self.results]
        measured += [(model, HELD_OUT, contents) for model, contents in self.held_out.items()]
        made = {stage: manifest["fingerprint"] for stage, manifest in self.manifests.items()}
        return [f"{m} {name}" for m, name, c in measured if made.get(m, found := c["model"]["fingerprint"]) != found]


def collect_run(experiment: Experiment) -> Run:
    """Read a run folder. UserError: it holds neither a finished stage nor a result."""
    models, folder, results = model_folders(experiment), Path(experiment.output_dir), []
    stages = [stage for stage in STAGES if stage in models]
    measured = read_results(experiment)
    held_out = {model: sets.pop(HELD_OUT) for model, sets in measured.items() if HELD_OUT in sets}
    for model, name, contents in ((model, *named) for model, sets in measured.items() for named in sets.items()):
        questions = name.partition(RETRIEVAL)[0] if contents["retrieval"] else name
        variant = name.removeprefix(questions).strip("_").replace("_", " ")
        label = f"{LABELS[model]} + {variant}" if variant else LABELS[model]
        headline = next((metric for metric in HEADLINES if metric in contents["metrics"]), None)
        known = contents["counts"]["questions"] - contents["counts"]["without_gold"]
        files, published = contents.get("files", {}).get("test", ()), contents.get("known_as")
        origin = published or ("invented" if is_invented(files) else "not known as a published set")
        called = _title(questions, published, contents["task"], contents.get("answers"))
        results.append(Result(model, name, questions, called, origin, label, headline, known, contents))
    titles = Counter({result.set: result.title for result in results}.values())
    results.sort(key=lambda result: result.has_retrieval)
    results = [r if titles[r.title] == 1 else replace(r, title=f"{r.title}, {r.set}") for r in results]
    comparisons = {}
    for entry in read_json(path) if (path := folder / "eval/comparisons.json").exists() else []:
        is_with_itself = entry["second"] not in models
        comparisons[entry["task"], entry["first" if is_with_itself else "second"], is_with_itself] = entry
    protocols: dict[str, dict[str, Any]] = {}
    for model in models:
        for path in sorted(result_folder(experiment, model, PROTOCOLS).glob("*.json")):
            protocols.setdefault(path.stem, {})[model] = read_json(path)
    logs = {stage: experiment.stage_folder(stage) / "metrics.jsonl" for stage in stages}
    # A build (scripts/build_chimed.py) has its manifest beside the folders of its stages.
    sources = [Path(source.path) for stage in stages for source in experiment.stage(stage).data]
    builds = [read_json(path) for source in sources if (path := source.parent / "manifest.json").exists()]
    manifests = {s: _renamed(read_manifest(models[s])) for s in stages if (models[s] / MANIFEST).exists()}
    trained = {stage: manifest["experiment"][stage] for stage, manifest in manifests.items()}
    run = Run(
        experiment=experiment,
        models=models,
        manifests=manifests,
        metrics={stage: rows for stage, path in logs.items() if path.exists() and (rows := read_metrics(path))},
        held_out=held_out,
        results=results,
        protocols=protocols,
        comparisons=comparisons,
        corpus=next((_renamed(build) for build in builds if "sources" in build), None),
        settings=experiment.model_dump(mode="json") | trained,
        ranks={stage: manifest["ranks"] for stage, manifest in manifests.items()},
    )
    if not (run.manifests or run.held_out or run.results or run.protocols):
        raise UserError(f"{folder}: no finished stage and no results; run a stage and scripts/evaluate.py first")
    return run


def is_invented(files: Iterable[str]) -> bool:
    """Does any of these files lie in the demo's world? Its manifest says what was planted in it."""
    manifests = {folder / "manifest.json" for file in files for folder in Path(file).parents}
    return any("planted" in read_json(path) for path in manifests if path.is_file())


def _title(name: str, published: str | None, task: str, answers: str | None) -> str:
    family, _, ending = task.partition("_")  # which said what is answered, before there were other forms of a task
    called = published or (_KINDS.get(family, name) if name == task else name)
    return f"{called.replace('_', ' ')} {_WAYS.get(answers or ending, '')}".strip()


def _renamed(value: Any) -> Any:
    """Manifests of earlier versions in today's words."""
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    return {_RENAMED.get(k, k): _renamed(v) for k, v in value.items()} if isinstance(value, dict) else value
