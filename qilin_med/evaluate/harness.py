"""The exam and text tasks of configs/tasks on the models of an experiment, by lm-evaluation-harness.

Every answer goes into a cache on disk as soon as it is given, keyed by model, template and number format, so that an
interrupted run asks no question twice; results are computed from the answers, and samples keep what made them.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qilin_med.artifact import (
    Artifact,
    digest,
    fingerprint_model,
    list_files,
    sha256_of,
    versions,
    write_json,
)
from qilin_med.config.experiment import Experiment, TaskSettings
from qilin_med.errors import UserError
from qilin_med.evaluate.metrics.statistics import Score, bootstrap_interval
from qilin_med.evaluate.results import read_result, read_samples, result_folder, write_result
from qilin_med.evaluate.tasks.questions import Retrieve
from qilin_med.evaluate.tasks.scoring import TASKS, Sample, Scoring, accuracy_by_facet, submission
from qilin_med.evaluate.tasks.wording import lettered
from qilin_med.model.folder import check_model_folder
from qilin_med.model.load import load_for_inference, load_tokenizer
from qilin_med.prompt.wording import option_lines

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PACKAGE = Path(__file__).parent
TASK_FILES = PACKAGE.parents[1] / "configs/tasks"
# Code that decides a score; results of other code are computed again, from the cached answers.
CODE = ("tasks", "metrics", "extraction.py", "../prompt/wording.py")
LIBRARIES = ("lm_eval", "sacrebleu", "rouge-chinese", "jieba", "scikit-learn")


@dataclass(frozen=True)
class Retrieval:
    """Text before each question: where it comes from, and the fingerprint of that."""

    retrieve: Retrieve
    fingerprint: str


class ModelUnderTest:
    """A model of an experiment; it is loaded when the first question is asked."""

    def __init__(self, experiment: Experiment, name: str, folder: Path):
        self.experiment, self.name, self.folder = experiment, name, folder
        check_model_folder(folder)
        self.tokenizer = load_tokenizer(folder, experiment.model.template)
        self.chat = name in experiment.evaluation.chat
        self.facts = {
            "model": {"name": name, "folder": str(folder), "fingerprint": fingerprint_model(folder)},
            "chat": self.chat,
            "template": digest(self.tokenizer.chat_template) if self.chat else None,
            "dtype": experiment.model.dtype,
            "backend": experiment.evaluation.backend,
        }

    @property
    def results(self) -> Path:
        return result_folder(self.experiment, self.name, "")

    @cached_property
    def lm(self) -> Any:
        """The model for lm-evaluation-harness, with the cache of its answers."""
        from qilin_med.evaluate.answers import AnsweringLM

        lm = self._open_vllm() if self.experiment.evaluation.backend == "vllm" else self._open_hf()
        # One file a rank; the folder's name holds whatever else changes an answer.
        cached = {key: self.facts[key] for key in ("template", "dtype", "backend")}
        key = digest([self.facts["model"]["fingerprint"], cached])[:16]
        return AnsweringLM(lm, self.results / "answers" / f"{key}-rank{lm.rank}.db")

    def _open_hf(self) -> Any:
        from qilin_med.evaluate.lm import SharedPrefixLM

        model = load_for_inference(self.folder, self.experiment.model, _device(self.experiment))
        return SharedPrefixLM(model, self.tokenizer, self.experiment.evaluation.batch_size)

    def _open_vllm(self) -> Any:
        from lm_eval.api.registry import get_model

        check_backend(self.experiment)
        arguments = {"pretrained": str(self.folder), "dtype": self.experiment.model.dtype, "trust_remote_code": False}
        return get_model("vllm").create_from_arg_obj(arguments, {"batch_size": "auto"})


def check_backend(experiment: Experiment) -> None:
    """UserError if what answers the questions is not installed."""
    if experiment.evaluation.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("evaluation.backend is 'vllm', which is not installed: pip install vllm, or set 'hf'")


def _device(experiment: Experiment) -> str:
    if experiment.launch.device == "cpu":
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


# -------------------------------------------------------------------------------------------------------- running


def run_task(
    model: ModelUnderTest, name: str, settings: TaskSettings, retrieval: Retrieval | None = None, suffix: str = ""
) -> dict[str, Any]:
    """Ask one set of questions and make the result <name><suffix> of the model.

    A result of the same inputs is not computed again. Under `accelerate launch` every rank must call this; only the
    first writes, and the others return {}. UserError: the task or a file is unknown, or prompts cannot fit.
    """
    quiet_harness()
    is_first = int(os.environ.get("RANK", "0")) == 0
    inputs = {**describe_task(name, settings), **model.facts, "retrieval": retrieval.fingerprint if retrieval else None}
    # Plain text after worked examples goes on with a further question; in a chat the template ends the answer.
    inputs["until"] = ["\n\n"] if inputs["shots"] and not model.chat and inputs["max_new_tokens"] else []
    artifact = Artifact(model.results / f"{name}{suffix}", inputs)
    if artifact.state().name == "done":
        return read_result(artifact.folder) if is_first else {}
    task, scoring = load_task(name, inputs, retrieval), TASKS[inputs["task"]]
    check_room(name, inputs, model.lm.max_length, model.folder)
    asked = _ask(model, task, settings)
    if asked is None:
        return {}
    samples = [_sample(scoring, raw) for raw in sorted(asked, key=lambda raw: raw["doc_id"])]
    artifact.facts = {"versions": versions(*LIBRARIES), "experiment": model.experiment.model_dump(mode="json")}
    return write_result(artifact, _report(model, task, scoring, samples), samples)


def describe_task(name: str, settings: TaskSettings) -> dict[str, Any]:
    """What decides a set's questions and scores: task and version, files by sha256, shots, limits, and our code."""
    task = settings.task or name
    if task not in TASKS:
        raise UserError(
            f"evaluation.tasks: unknown task '{task}'; expected one of {', '.join(TASKS)} as the key, or as its 'task'"
        )
    index = _manager({}).task_index[task].cfg
    own = index["metadata"]
    files = {
        "test": settings.test or [own["test"]],
        "fewshot": (settings.fewshot or [own["fewshot"]]) if "fewshot" in own else [],
    }
    shots = index.get("num_fewshot", 0) if settings.shots is None else settings.shots
    if shots and "fewshot_split" not in index:
        raise UserError(f"evaluation.tasks.{name}.shots is {shots}, but this task has no worked examples; set it to 0")
    if not shots:
        files["fewshot"] = []
    generation = index.get("generation_kwargs")
    return {
        "task": task,
        "version": own["version"],
        "code": _code_digest(task),
        "files": {kind: {path: _file_digest(path) for path in paths} for kind, paths in files.items()},
        "columns": settings.columns,
        "split": settings.split if "split" in own else None,
        "shots": shots,
        "limit": settings.limit,
        "max_new_tokens": (settings.max_new_tokens or generation["max_gen_toks"]) if generation else None,
    }


def load_task(name: str, inputs: dict[str, Any], retrieval: Retrieval | None = None) -> "Task":
    """The harness's task with its questions read. `inputs`: from `describe_task`, and "until" where an answer ends.

    UserError: no usable question, or too few worked examples."""
    metadata = {
        "test": list(inputs["files"]["test"]),
        "fewshot": list(inputs["files"]["fewshot"]),
        "columns": inputs["columns"],
        "split": inputs["split"],
        "retrieve": (lambda questions: retrieval.retrieve(questions)) if retrieval else None,
    }
    manager = _manager({key: value for key, value in metadata.items() if value is not None})
    task = manager.load([inputs["task"]])["tasks"][inputs["task"]]
    if inputs["shots"] > (found := len(task.sampler.df)):
        raise UserError(
            f"{name}: {inputs['shots']} worked examples asked for, {found} found; lower shots or add a file"
        )
    task.set_config("num_fewshot", inputs["shots"])
    task.set_fewshot_seed(0)
    if inputs["max_new_tokens"]:
        generation = {"max_gen_toks": inputs["max_new_tokens"], "until": inputs.get("until", [])}
        task.set_config("generation_kwargs", generation, update=True)
    return task


def _manager(metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)


def check_room(name: str, inputs: dict[str, Any], positions: int, folder: Path) -> None:
    if (generated := inputs["max_new_tokens"]) and positions <= generated:
        raise UserError(
            f"{name}: max_new_tokens is {generated}, which leaves no room for a question in the {positions} positions of"
            f" {folder}; lower evaluation.tasks.{name}.max_new_tokens"
        )


def _ask(model: ModelUnderTest, task: "Task", settings: TaskSettings) -> list[dict[str, Any]] | None:
    """The harness's samples of all ranks; None on ranks but the first."""
    from lm_eval.evaluator import evaluate

    model.lm.lm.batch_size_per_gpu = settings.batch_size or model.experiment.evaluation.batch_size
    results = evaluate(
        model.lm,
        {"tasks": {task.config.task: task}},
        limit=settings.limit,
        bootstrap_iters=0,
        apply_chat_template=model.chat,
        fewshot_as_multiturn=True,
    )
    return results["samples"][task.config.task] if results else None


def _sample(scoring: Scoring, raw: dict[str, Any]) -> Sample:
    row, results = raw["doc"], raw["filtered_resps"]
    prompt = raw["arguments"][0][0]
    is_generated = isinstance(results[0], str)
    choices = [arguments[1] for arguments in raw["arguments"]]
    return {
        "id": row["id"],
        "number": row["number"],
        "question": _question(row),
        "prompt": prompt,
        "output": results[0] if is_generated else [[c, r[0]] for c, r in zip(choices, results, strict=True)],
        "answer": scoring.answer(row, results),
        "gold": scoring.gold(row),
        "score": {metric: raw[metric] for metric in raw["metrics"]},
        "facets": scoring.facets(row),
        "sources": row["sources"],
    }


def _question(row: dict[str, Any]) -> str:
    """The question as a person reads it: without instructions, examples and passages, with its options."""
    return "\n".join([row["stem"], *([option_lines(lettered(row))] if "options" in row else [])])


def _report(model: ModelUnderTest, task: "Task", scoring: Scoring, samples: list[Sample]) -> dict[str, Any]:
    known = [sample for sample in samples if sample["gold"]]
    metrics = {name: with_interval(score) for name, score in scoring.summarise(known).items()} if known else {}
    by_facet = {
        facet: {value: {**with_interval(score), "questions": len(score.rows)} for value, score in groups.items()}
        for facet, groups in accuracy_by_facet(known).items()
    }
    return {
        "metrics": metrics,
        "by_facet": by_facet,
        "counts": _count(model, task, samples),
    }


def _count(model: ModelUnderTest, task: "Task", samples: list[Sample]) -> dict[str, Any]:
    generated = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
    room = model.lm.max_length - generated
    counts = {"questions": len(samples), "without_gold": sum(not sample["gold"] for sample in samples)}
    counts["cut_prompts"] = sum(len(model.lm.tok_encode(sample["prompt"])) > room for sample in samples)
    counts["skipped"] = task.dataset["skipped"]
    for name in ("unparsed", "empty"):
        if name in samples[0]["score"]:
            counts[name] = sum(sample["score"][name] for sample in samples)
    return counts


def with_interval(score: Score) -> dict[str, float]:
    """Value and 95% interval."""
    low, high = bootstrap_interval(score)
    return {"value": score.value(), "low": low, "high": high}


# ---------------------------------------------------------------------------------------------------------- files


def write_submission(model: ModelUnderTest, name: str) -> Path:
    """C-Eval's official file from the samples of a task's result."""
    path = model.results / f"{name}.submission.json"
    write_json(path, submission(list(read_samples(model.results / name))))
    return path


def _file_digest(path: str) -> str:
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file; get it (data/README.md), or name yours in evaluation.tasks")
    return digest(list_files(place)) if place.is_dir() else sha256_of(place)


def _code_digest(task: str) -> str:
    sources = [path for part in CODE for path in ([PACKAGE / part] if "." in part else (PACKAGE / part).rglob("*.py"))]
    return digest({path.name: sha256_of(path) for path in [*sorted(sources), TASK_FILES / f"{task}.yaml"]})


def quiet_harness() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
