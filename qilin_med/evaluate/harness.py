"""The exam and text tasks of configs/tasks on the models of an experiment, by lm-evaluation-harness.

Every answer goes into a cache on disk as soon as it is given, keyed by model, template and number format, so that an
interrupted run asks no question twice; results are computed from the answers, and samples keep what made them.
"""

import importlib.util
import os
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qilin_med.artifact import Artifact, digest, fingerprint_model, list_files, sha256_of, versions, write_json
from qilin_med.config.experiment import Experiment, TaskSettings
from qilin_med.console.progress import progress
from qilin_med.errors import UserError
from qilin_med.evaluate.results import RETRIEVAL, WITHOUT_EXAMS, read_result, read_samples, result_folder, write_result
from qilin_med.evaluate.tasks.questions import Retrieve, lettered
from qilin_med.evaluate.tasks.scoring import TASKS, Sample, accuracy_by_facet
from qilin_med.model.folder import check_model_folder
from qilin_med.model.load import load_for_inference, load_tokenizer
from qilin_med.prompt.wording import option_lines

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PACKAGE = Path(__file__).parents[1]
TASK_FILES = PACKAGE.parent / "configs/tasks"
# Code that decides a score; results of other code are computed again, from the cached answers.
CODE = ("evaluate/tasks/*.*", "evaluate/metrics/**/*.py", "evaluate/extraction.py", "prompt/wording.py")
LIBRARIES = ("lm_eval", "sacrebleu", "rapidfuzz", "jieba", "scikit-learn")


class Retrieval(NamedTuple):
    """Where the text before each question comes from, and a fingerprint of that."""

    retrieve: Retrieve
    fingerprint: str


def open_retrievals(experiment: Experiment) -> dict[str, Retrieval]:
    """By the ending of result names: from all sources, and from all but `retrieval.exam_sources`."""
    from qilin_med.retrieve.retriever import Retriever

    settings = experiment.retrieval
    excluded = {RETRIEVAL: settings.exclude_sources}
    if settings.exam_sources:
        excluded[WITHOUT_EXAMS] = [*settings.exclude_sources, *settings.exam_sources]
    opened = {}
    for ending, sources in excluded.items():
        chosen = settings.model_copy(update={"exclude_sources": sources})
        with progress("opening the index"):
            retriever = Retriever(experiment.model_copy(update={"retrieval": chosen}))
        made_with = [retriever.fingerprint, chosen.model_dump(mode="json", exclude={"exam_sources"})]
        opened[ending] = Retrieval(
            lambda questions, index=retriever: [
                (found.text, found.sources) for found in index.contexts([index.query(*asked) for asked in questions])
            ],
            digest(made_with),
        )
    return opened


class ModelUnderTest:
    """A model of an experiment; it is loaded when the first question is asked."""

    def __init__(self, experiment: Experiment, name: str, folder: Path):
        self.experiment, self.folder = experiment, folder
        check_model_folder(folder)
        self.tokenizer = load_tokenizer(folder, experiment.model.template)
        self.chat = name in experiment.evaluation.chat
        self.results = result_folder(experiment, name, "")
        self.facts = {
            "model": {"name": name, "folder": str(folder), "fingerprint": fingerprint_model(folder)},
            "chat": self.chat,
            "template": digest(self.tokenizer.chat_template) if self.chat else None,
            "dtype": experiment.model.dtype,
            "backend": experiment.evaluation.backend,
        }

    @cached_property
    def lm(self) -> Any:
        """The model for lm-evaluation-harness, with the cache of its answers."""
        from qilin_med.evaluate.lm import AnsweringLM

        if self.facts["backend"] == "hf":
            lm = self.open_hf()
        else:
            from lm_eval.api.registry import get_model

            check_backend(self.experiment)
            arguments = {"pretrained": str(self.folder), "dtype": self.facts["dtype"], "trust_remote_code": False}
            lm = get_model("vllm").create_from_arg_obj(arguments, {"batch_size": "auto"})
        # One file per rank; its name holds whatever else changes an answer.
        cached = {key: self.facts[key] for key in ("template", "dtype", "backend")}
        key = digest([self.facts["model"]["fingerprint"], cached])[:16]
        return AnsweringLM(lm, self.results / "answers" / f"{key}-rank{lm.rank}.db")

    def open_hf(self) -> Any:
        from qilin_med.evaluate.lm import SharedPrefixLM

        on_cpu = self.experiment.launch.device == "cpu"
        device = "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        model = load_for_inference(self.folder, self.experiment.model, device)
        return SharedPrefixLM(model, self.tokenizer, self.experiment.evaluation.batch_size)


def check_backend(experiment: Experiment) -> None:
    """UserError if what answers the questions is not installed."""
    if experiment.evaluation.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("evaluation.backend is 'vllm', which is not installed: pip install vllm, or set 'hf'")


# -------------------------------------------------------------------------------------------------------- running


def run_task(
    model: ModelUnderTest, name: str, settings: TaskSettings, retrieval: Retrieval | None = None, suffix: str = ""
) -> dict[str, Any]:
    """Ask one set of questions and make the result <name><suffix> of the model.

    A result of the same inputs is not computed again. Under `accelerate launch` every rank must call this; only the
    first writes, and the others return {}. UserError: the task or a file is unknown, or prompts cannot fit.
    """
    from lm_eval.evaluator import evaluate

    inputs = {**describe_task(name, settings), **model.facts, "retrieval": retrieval.fingerprint if retrieval else None}
    # After worked examples a model in plain text goes on to invent a question; in a chat the template ends the answer.
    inputs["until"] = ["\n\n"] if inputs["shots"] and not model.chat and inputs["max_new_tokens"] else []
    artifact = Artifact(model.results / f"{name}{suffix}", inputs)
    if artifact.state().name == "done":
        return read_result(artifact.folder) if os.environ.get("RANK", "0") == "0" else {}
    task = load_task(name, inputs, retrieval)
    check_room(name, inputs, model.lm.max_length, model.folder)
    model.lm.lm.batch_size_per_gpu = settings.batch_size or model.experiment.evaluation.batch_size
    asking = {"limit": settings.limit, "apply_chat_template": model.chat, "fewshot_as_multiturn": True}
    answered = evaluate(model.lm, {"tasks": {inputs["task"]: task}}, bootstrap_iters=0, **asking)
    if answered is None:  # on all ranks but the first
        return {}
    asked = sorted(answered["samples"][inputs["task"]], key=lambda raw: raw["doc_id"])
    samples = [_sample(inputs["task"], raw) for raw in asked]
    artifact.facts = {"versions": versions(*LIBRARIES), "experiment": model.experiment.model_dump(mode="json")}
    return write_result(artifact, _scores(model, inputs, samples, task.dataset["skipped"]), samples)


def describe_task(name: str, settings: TaskSettings) -> dict[str, Any]:
    """What decides a set's questions and scores: task and version, files by sha256, shots, limits, and our code."""
    task = settings.task or name
    if task not in TASKS:
        raise UserError(
            f"evaluation.tasks: unknown task '{task}'; expected one of {', '.join(TASKS)} as the key, or as its 'task'"
        )
    index = _manager({}).task_index[task].cfg
    own, generation = index["metadata"], index.get("generation_kwargs")
    shots = index.get("num_fewshot", 0) if settings.shots is None else settings.shots
    if shots and "fewshot_split" not in index:
        raise UserError(f"evaluation.tasks.{name}.shots is {shots}, but this task has no worked examples; set it to 0")
    examples = (settings.fewshot or [own["fewshot"]]) if shots and "fewshot" in own else []
    files = {"test": settings.test or [own["test"]], "fewshot": examples}
    code = [TASK_FILES / f"{task}.yaml", *(path for pattern in CODE for path in PACKAGE.glob(pattern))]
    return {
        "task": task,
        "version": own["version"],
        "code": digest({f"{path.parent.name}/{path.name}": sha256_of(path) for path in code}),
        "files": {kind: {path: _fingerprint(Path(path)) for path in paths} for kind, paths in files.items()},
        "columns": settings.columns,
        "split": settings.split if "split" in own else None,
        "shots": shots,
        "limit": settings.limit,
        "max_new_tokens": (settings.max_new_tokens or generation["max_gen_toks"]) if generation else None,
    }


def _fingerprint(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path}: no such file; get it (data/README.md), or name yours in evaluation.tasks")
    return digest(list_files(path)) if path.is_dir() else sha256_of(path)


def load_task(name: str, inputs: dict[str, Any], retrieval: Retrieval | None = None) -> "Task":
    """The harness's task with its questions read. `inputs`: from `describe_task`, and "until" where an answer ends.

    UserError: no usable question, or too few worked examples."""
    metadata = {**{kind: list(paths) for kind, paths in inputs["files"].items()}, "columns": inputs["columns"]}
    if inputs["split"]:
        metadata["split"] = inputs["split"]
    if retrieval:
        metadata["retrieve"] = retrieval.retrieve
    task = _manager(metadata).load([inputs["task"]])["tasks"][inputs["task"]]
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
    """UserError if an answer may be as long as the model."""
    if (generated := inputs["max_new_tokens"]) and positions <= generated:
        raise UserError(
            f"{name}: max_new_tokens is {generated}, which leaves no room for a question in the {positions} positions of"
            f" {folder}; lower evaluation.tasks.{name}.max_new_tokens"
        )


# -------------------------------------------------------------------------------------------------------- results


def _sample(task: str, raw: dict[str, Any]) -> Sample:
    """One question and its answer, from what the harness says of it."""
    row, results, scoring = raw["doc"], raw["filtered_resps"], TASKS[task]
    output = results[0]
    if not isinstance(output, str):
        choices = [arguments[1] for arguments in raw["arguments"]]
        output = [[choice, log_prob] for choice, (log_prob, _) in zip(choices, results, strict=True)]
    # As a person reads it: without instructions, examples and passages, with its options.
    question = "\n".join([row["stem"], *([option_lines(lettered(row))] if "options" in row else [])])
    return {
        "id": row["id"],
        "number": row["number"],
        "question": question,
        "prompt": raw["arguments"][0][0],
        "output": output,
        "answer": scoring.answer(row, results),
        "gold": row[scoring.gold],
        "score": {metric: raw[metric] for metric in raw["metrics"]},
        "facets": dict(row["facets"]),
        "sources": row["sources"],
    }


def _scores(model: ModelUnderTest, inputs: dict[str, Any], samples: list[Sample], skipped: dict) -> dict[str, Any]:
    """Metrics with their intervals, whole and by facet, of the questions whose answers are known; and counts."""
    known = [sample for sample in samples if sample["gold"]]
    scores = TASKS[inputs["task"]].summarise(known) if known else {}
    room = model.lm.max_length - (inputs["max_new_tokens"] or 0)
    counts = {
        "questions": len(samples),
        "without_gold": len(samples) - len(known),
        "cut_prompts": sum(len(model.lm.tok_encode(sample["prompt"])) > room for sample in samples),
        "skipped": skipped,
    }
    for name in {"unparsed", "empty"} & samples[0]["score"].keys():
        counts[name] = sum(sample["score"][name] for sample in samples)
    metrics = {name: score.with_interval() for name, score in scores.items()}
    return {"metrics": metrics, "by_facet": accuracy_by_facet(known), "counts": counts}


def write_submission(model: ModelUnderTest, name: str) -> Path:
    """C-Eval's official file, {subject: {id: letter}}, from the samples of a result; an unparsed answer has the letter ""."""
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in read_samples(model.results / name):
        answers[sample["facets"]["subject"]][str(sample["number"])] = sample["answer"]
    path = model.results / f"{name}.submission.json"
    write_json(path, dict(sorted(answers.items())))
    return path
