"""Measure base and stages: held-out sets, and the exam and text tasks that the experiment names.

python scripts/evaluate.py --config configs/demo.json [--models base,sft] [--tasks heldout,cmexam_letters] [--retrieval]

Results are folders runs/<name>/eval/<model>/<task>, paired tests between neighbouring models lie in
runs/<name>/eval/comparisons.json. Run it again after any interruption. On several GPUs: accelerate launch scripts/evaluate.py ...
"""

import os
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from qilin_med.config.experiment import Experiment, TaskSettings, experiment_parser, parse_experiment
from qilin_med.console.progress import progress
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.evaluate.results import HELD_OUT, RETRIEVAL, WITHOUT_EXAMS, existing_models, result_folder

if TYPE_CHECKING:
    from qilin_med.evaluate.harness import Retrieval


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--models", help="comma-separated: base, pretraining, sft, dpo (default: all)")
    parser.add_argument(
        "--tasks",
        help="comma-separated: heldout and names of evaluation.tasks or configs/tasks (default: the experiment's)",
    )
    parser.add_argument(
        "--submission", action="store_true", help="answer C-Eval's test split and write its official file"
    )
    parser.add_argument(
        "--retrieval",
        action="store_true",
        help="ask after passages of the index: results <task>_retrieval, and with"
        " retrieval.exam_sources <task>_retrieval_without_exams",
    )
    arguments, experiment = parse_experiment(parser)

    from qilin_med.train.stage import quiet_libraries

    quiet_libraries()

    folders = existing_models(experiment, arguments.models.split(",") if arguments.models else None)
    tasks = arguments.tasks.split(",") if arguments.tasks else [HELD_OUT, *experiment.evaluation.tasks]
    if HELD_OUT in tasks and _is_first():
        _measure_held_out(experiment, folders)
    if asked := [task for task in tasks if task != HELD_OUT]:
        _ask(experiment, folders, asked, arguments.submission, arguments.retrieval)


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _measure_held_out(experiment: Experiment, folders: dict[str, Path]) -> None:
    with progress("held-out sets"):
        from qilin_med.evaluate.held_out import evaluate_model
        from qilin_med.report.tables import held_out_table, markdown_table

        results = {
            name: evaluate_model(experiment, folder, result_folder(experiment, name, HELD_OUT))
            for name, folder in folders.items()
        }
    print(markdown_table(held_out_table(results)))


def _ask(experiment: Experiment, folders: dict[str, Path], tasks: list[str], submission: bool, retrieval: bool) -> None:
    with progress("loading libraries"):
        from qilin_med.evaluate.comparison import compare_models
        from qilin_med.evaluate.harness import ModelUnderTest, describe_task, run_task, write_submission

    settings = {task: _settings(experiment, task, submission) for task in tasks}
    # A wrong name or path is told before any model is loaded.
    kinds = {task: describe_task(task, settings[task])["task"] for task in tasks}
    with progress("opening the index") if retrieval else nullcontext():
        sources = _open_retrievals(experiment) if retrieval else {"": None}
    for name, folder in folders.items():
        with progress(f"reading {folder}"):
            model = ModelUnderTest(experiment, name, folder)
        for task, (suffix, passages) in product(tasks, sources.items()):
            is_submitted = submission and kinds[task].startswith("ceval")
            suffix = ("_test" if is_submitted else "") + suffix
            with progress(f"{name} {task}{suffix}"):
                result = run_task(model, task, settings[task], passages, suffix)
            if result:
                print(_line(name, task + suffix, result), flush=True)
            if result and is_submitted:
                print(f"submission: {write_submission(model, task + suffix)}")
    if _is_first():
        with progress("comparing the models"):
            compare_models(experiment)


def _open_retrievals(experiment: Experiment) -> "dict[str, Retrieval]":
    """By the suffix of their results: all sources, and all but those that stem from exams."""
    opened = {RETRIEVAL: _open_retrieval(experiment)}
    if exams := experiment.retrieval.exam_sources:
        excluded = [*experiment.retrieval.exclude_sources, *exams]
        retrieval = experiment.retrieval.model_copy(update={"exclude_sources": excluded})
        opened[WITHOUT_EXAMS] = _open_retrieval(experiment.model_copy(update={"retrieval": retrieval}))
    return opened


def _open_retrieval(experiment: Experiment) -> "Retrieval":
    from qilin_med.artifact import digest
    from qilin_med.evaluate.harness import Retrieval
    from qilin_med.retrieve.retriever import Retriever

    retriever = Retriever(experiment)
    settings = experiment.retrieval.model_dump(mode="json", exclude={"exam_sources"})
    return Retrieval(
        lambda questions: retriever.contexts([retriever.query(*question) for question in questions]),
        digest([retriever.fingerprint, settings]),
    )


def _settings(experiment: Experiment, task: str, submission: bool) -> TaskSettings:
    settings = experiment.evaluation.tasks.get(task, TaskSettings())
    return settings.model_copy(update={"split": "test"}) if submission else settings


def _line(model: str, task: str, result: dict) -> str:
    shown = list(result["metrics"].items())[:4]
    values = ", ".join(f"{name} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for name, m in shown)
    return f"{model} {task}: {result['counts']['questions']} questions; {values or 'answers unknown'}"


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
