"""The exam and text tasks of configs/tasks on the models of an experiment, by lm-evaluation-harness.

Every answer goes into a cache on disk as soon as it is given, keyed by model, prompt and number format, so that an
interrupted run asks no question twice; results are computed from the answers, and samples keep what made them.
"""

import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qilin_med.artifact import Artifact, digest, fingerprint_model, list_files, sha256_of, versions, write_json
from qilin_med.config.experiment import Experiment, Listed, TaskSettings
from qilin_med.console.progress import progress
from qilin_med.errors import UserError
from qilin_med.evaluate.results import RETRIEVAL, WITHOUT_EXAMS, read_result, read_samples, result_folder, write_result
from qilin_med.evaluate.tasks.questions import Asked, Retrieve
from qilin_med.evaluate.tasks.scoring import Sample, accuracy_by_facet, calibration, favourite, make_sample, summarise
from qilin_med.model.folder import check_model_folder
from qilin_med.model.load import load_for_inference, load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.task import Task

PACKAGE = Path(__file__).parents[1]
TASK_FILES = PACKAGE.parent / "configs/tasks"
# Code that decides a score; results of other code are computed again, from the cached answers.
CODE = ("evaluate/tasks/*.*", "evaluate/metrics/**/*.py", "evaluate/extraction.py", "prompt/wording.py")
SPARE_TOKENS = 16  # of a choice, and of what tokens may grow by where texts are joined
LIBRARIES = ("lm_eval", "sacrebleu", "rapidfuzz", "jieba", "scikit-learn")


class Retrieval(NamedTuple):
    """Where the text before each question comes from, and a fingerprint of that."""

    find: Callable[[list[Asked], list[int]], list[tuple[str, list[str], bool]]]
    """As `Retrieve`, given also how many tokens there is room for beside each question."""
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

        def find(
            asked: list[Asked], rooms: list[int], index: Retriever = retriever
        ) -> list[tuple[str, list[str], bool]]:
            prompts = index.contexts([index.query(question.stem, question.options) for question in asked], rooms)
            return [(prompt.text, prompt.sources, prompt.shortened) for prompt in prompts]

        opened[ending] = Retrieval(find, digest(made_with))
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
            "template": digest(self.tokenizer.chat_template),
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
        cached = {key: self.facts[key] for key in ("dtype", "backend")}
        key = digest([self.facts["model"]["fingerprint"], cached])[:16]
        return AnsweringLM(lm, self.results / "answers" / f"{key}-rank{lm.rank}.db")

    def passages(self, retrieval: Retrieval, inputs: dict[str, Any]) -> Retrieve:
        """Passages for questions asked as `inputs` (`describe_task`) say, as many as the model has room for."""
        chat, room = inputs["chat"], self.lm.max_length - (inputs["max_new_tokens"] or 0) - SPARE_TOKENS

        def retrieve(asked: list[Asked]) -> list[tuple[str, list[str], bool]]:
            return retrieval.find(asked, [room - self.count_tokens(question.said, chat) for question in asked])

        return retrieve

    def count_tokens(self, said: list[str], chat: bool) -> int:
        """Tokens of a prompt; `said` as in `Asked`."""
        system, *turns, prefix = said
        if not chat:
            return len(self.tokenizer("\n\n".join([system, *turns, prefix])).input_ids)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(self.tokenizer(text + prefix).input_ids)

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

    inputs = {
        **model.facts,
        **describe_task(name, settings, model.chat),
        "retrieval": retrieval and retrieval.fingerprint,
    }
    artifact = Artifact(model.results / f"{name}{suffix}", inputs)
    if artifact.state().name == "done":
        return read_result(artifact.folder) if os.environ.get("RANK", "0") == "0" else {}
    check_room(name, inputs, model.lm.max_length, model.folder)
    task = load_task(name, inputs, retrieval and model.passages(retrieval, inputs))
    model.lm.lm.batch_size_per_gpu = settings.batch_size or model.experiment.evaluation.batch_size
    asking = {"limit": settings.limit, "apply_chat_template": inputs["chat"], "fewshot_as_multiturn": True}
    answered = evaluate(model.lm, {"tasks": {"exam": task}}, bootstrap_iters=0, **asking)
    if answered is None:  # on all ranks but the first
        return {}
    [asked] = answered["samples"].values()
    artifact.facts = {"versions": versions(*LIBRARIES), "experiment": model.experiment.model_dump(mode="json")}
    artifact.facts["overrides"] = model.experiment.overrides
    samples = [make_sample(raw) for raw in sorted(asked, key=lambda raw: raw["doc_id"])]
    return write_result(artifact, _scores(model, inputs, samples, task.dataset), samples)


@cache
def task_configs() -> dict[str, dict[str, Any]]:
    """The files of configs/tasks by task, with what they include."""
    return {name: entry.cfg for name, entry in _manager({}).task_index.items()}


def _manager(metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata)


def configure_task(name: str, settings: TaskSettings) -> dict[str, Any]:
    """The task's file as the settings change it: "answers" (the form of configs/tasks/exam_*.yaml that asks it), "questions"
    (arguments of `load_questions`), "shots", "max_new_tokens". UserError: there is no such task, or not in this form."""
    configs, task = task_configs(), settings.task or name
    if task not in configs:
        raise UserError(f"evaluation.tasks: unknown task '{task}'; expected one of {', '.join(configs)} as the key, or as its"
                        " 'task'")  # fmt: skip
    config = configs[task]
    own = config["custom_dataset"].rpartition("load_")[2]
    if settings.answers and own == "text":
        raise UserError(f"evaluation.tasks.{name}.answers is '{settings.answers}', but {task} asks for texts, not for"
                        " options; leave it out")  # fmt: skip
    answers = settings.answers or own
    generation = (config if answers == own else configs[f"exam_{answers}"]).get("generation_kwargs")
    questions = config.get("dataset_kwargs", {}) | config["metadata"] | settings.questions()
    questions.pop("shots", None)  # for lm_eval, which does not hand num_fewshot on
    return {
        "task": task,
        "answers": answers,
        "questions": questions,
        "shots": config["num_fewshot"] if settings.shots is None else settings.shots,
        "max_new_tokens": (settings.max_new_tokens or generation["max_gen_toks"]) if generation else None,
    }


def describe_task(name: str, settings: TaskSettings, chat: bool = False) -> dict[str, Any]:
    """What decides a set's questions and scores: task and version, files by sha256, prompts, shots, limits, our code; and
    whether they are asked in a chat template, where the task leaves it to `chat`."""
    config = configure_task(name, settings)
    questions, shots = config["questions"], config["shots"]
    paths = {kind: Listed.func(questions.pop(kind, [])) for kind in ("test", "fewshot")}
    if not paths["test"]:
        raise UserError(f"evaluation.tasks.{name}.test is empty; name the files with the questions")
    files = {"test": paths["test"], "fewshot": paths["fewshot"] if shots else []}
    code = [path for pattern in CODE for path in PACKAGE.glob(pattern)]
    chat = chat if questions.get("chat") is None else questions["chat"]
    return {
        **config,
        "version": questions.pop("version"),
        "code": digest({f"{path.parent.name}/{path.name}": sha256_of(path) for path in code}),
        "files": {kind: {path: _fingerprint(Path(path)) for path in named} for kind, named in files.items()},
        "chat": chat,
        "limit": settings.limit,
        # After worked examples a model in plain text goes on to invent a question; in a chat the template ends the answer.
        "until": ["\n\n"] if shots and config["max_new_tokens"] and not chat else [],
    }


def _fingerprint(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path}: no such file; get it (data/README.md), or name yours in evaluation.tasks")
    return digest(list_files(path)) if path.is_dir() else sha256_of(path)


def load_task(name: str, inputs: dict[str, Any], retrieve: Retrieve | None = None) -> "Task":
    """The harness's task with its questions read. `inputs`: from `describe_task`.

    UserError: no usable question, or too few worked examples."""
    files = {kind: list(paths) for kind, paths in inputs["files"].items()}
    form, shots = f"exam_{inputs['answers']}", inputs["shots"]
    metadata = {**inputs["questions"], **files, "shots": shots, "retrieve": retrieve}
    task = _manager(metadata).load([form])["tasks"][form]
    found = Counter(row["group"] for row in task.sampler.df)
    if few := [group for group in {row["group"] for row in task.eval_docs} if found[group] < shots]:
        of = f" of {few[0]}" if few[0] else ""
        raise UserError(
            f"{name}: {shots} worked examples{of} asked for, {found[few[0]]} found; lower shots or add a file"
        )
    task.set_config("num_fewshot", shots)
    if inputs["max_new_tokens"]:
        generation = {"max_gen_toks": inputs["max_new_tokens"], "until": inputs["until"]}
        task.set_config("generation_kwargs", generation, update=True)
    return task


def check_room(name: str, inputs: dict[str, Any], positions: int, folder: Path) -> None:
    """UserError if an answer may be as long as the model."""
    if (generated := inputs["max_new_tokens"]) and positions <= generated:
        raise UserError(
            f"{name}: max_new_tokens is {generated}, which leaves no room for a question in the {positions} positions of"
            f" {folder}; lower evaluation.tasks.{name}.max_new_tokens"
        )


# -------------------------------------------------------------------------------------------------------- results


def _scores(
    model: ModelUnderTest, inputs: dict[str, Any], samples: list[Sample], read: dict[str, Any]
) -> dict[str, Any]:
    """Metrics with their intervals, whole and by facet, of the questions whose answers are known; and counts."""
    known = [sample for sample in samples if sample["gold"]]
    scores = summarise(known, inputs["questions"].get("averages", {})) if known else {}
    room = model.lm.max_length - (inputs["max_new_tokens"] or 0)
    counts = {
        "questions": len(samples),
        "without_gold": len(samples) - len(known),
        "several_answers": read["several_answers"],
        "cut_prompts": sum(len(model.lm.tok_encode(sample["prompt"])) > room for sample in samples),
        "shortened_passages": sum(sample["cut"] for sample in samples),
        "skipped": read["skipped"],
        "favourite": favourite(samples),
    }
    for name in {"unparsed", "empty"} & samples[0]["score"].keys():
        counts[name] = sum(sample["score"][name] for sample in samples)
    return {
        "known_as": read["known_as"],
        "split": read["split"],
        "metrics": {name: score.with_interval() for name, score in scores.items()},
        "by_facet": accuracy_by_facet(known),
        **({"calibration": found} if known and (found := calibration(known)) else {}),
        "counts": counts,
    }


def write_submission(model: ModelUnderTest, name: str) -> Path:
    """C-Eval's official file, {subject: {id: letter}}, from the samples of a result; an unparsed answer has the letter ""."""
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in read_samples(model.results / name):
        answers[sample["facets"]["subject"]][str(sample["number"])] = sample["answer"]
    path = model.results / f"{name}.submission.json"
    write_json(path, dict(sorted(answers.items())))
    return path
