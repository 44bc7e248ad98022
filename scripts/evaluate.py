"""Measure base and stages: held-out sets, and the exam and text tasks that the experiment names.

python scripts/evaluate.py --config configs/demo.json [--models base,sft] [--tasks heldout,cmexam_letters] [--retrieval]

Results are folders runs/<name>/eval/<model>/<task>; paired tests between neighbouring models lie in
runs/<name>/eval/comparisons.json, what evaluation.protocols asks in runs/<name>/eval/<model>/protocols. Run it again after
any interruption. On several GPUs: accelerate launch scripts/evaluate.py ...
"""

import os
from itertools import product
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import Experiment, TaskSettings, experiment_parser, parse_experiment
from qilin_med.console.progress import progress
from qilin_med.console.quiet import quiet_libraries
from qilin_med.errors import user_errors_end_with_one_line
from qilin_med.evaluate.results import HELD_OUT, existing_models

IS_FIRST_RANK = os.environ.get("RANK", "0") == "0"


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--models", help="comma-separated: base, pretraining, sft, dpo (default: all)")
    parser.add_argument("--tasks", help="comma-separated: heldout and names of evaluation.tasks or configs/tasks (default:"
                        " the experiment's)")  # fmt: skip
    submission = "answer C-Eval's test split and write its official file"
    parser.add_argument("--submission", action="store_true", help=submission)
    parser.add_argument("--retrieval", action="store_true", help="ask after passages of the index: results"
                        " <task>_retrieval, and with retrieval.exam_sources <task>_retrieval_without_exams")  # fmt: skip
    options, experiment = parse_experiment(parser)
    quiet_libraries()
    folders = existing_models(experiment, options.models.split(",") if options.models else None)
    protocols = experiment.evaluation.protocols
    tasks = options.tasks.split(",") if options.tasks else [HELD_OUT, *experiment.evaluation.tasks, *protocols]
    if HELD_OUT in tasks and IS_FIRST_RANK:
        measure(experiment, folders)
    if asked := [task for task in tasks if task != HELD_OUT and task not in protocols]:
        ask(experiment, folders, asked, options.submission, options.retrieval)
    if (varied := [task for task in tasks if task in protocols]) and not options.retrieval:
        vary(experiment, folders, varied)


def measure(experiment: Experiment, folders: dict[str, Path]) -> None:
    """Perplexities, answer loss and preference accuracy of each model, as a table."""
    with progress("held-out sets"):
        from qilin_med.evaluate.held_out import measure_held_out
        from qilin_med.report.tables import held_out_table, markdown_table

        measured = {name: measure_held_out(experiment, name, folder) for name, folder in folders.items()}
    print(markdown_table(held_out_table(measured)))


def ask(experiment: Experiment, folders: dict[str, Path], tasks: list[str], submission: bool, retrieval: bool) -> None:
    """Ask each model the questions of each task, then test what the stages changed."""
    with progress("loading libraries"):
        from qilin_med.evaluate import harness
        from qilin_med.evaluate.comparison import compare_models
        from qilin_med.report.tables import asides

    split = {"split": "test"} if submission else {}
    settings = {task: experiment.evaluation.tasks.get(task, TaskSettings()).model_copy(update=split) for task in tasks}
    # A wrong name or path is reported before any model is loaded.
    kinds = {task: harness.describe_task(task, settings[task])["task"] for task in tasks}
    sources = harness.open_retrievals(experiment) if retrieval else {"": None}
    for name, folder in folders.items():
        with progress(f"reading {folder}"):
            model = harness.ModelUnderTest(experiment, name, folder)
        for task, (ending, passages) in product(tasks, sources.items()):
            is_submitted = submission and kinds[task].startswith("ceval")
            suffix = ("_test" if is_submitted else "") + ending
            with progress(f"{name} {task}{suffix}"):
                result = harness.run_task(model, task, settings[task], passages, suffix)
            if result:  # on the first rank
                shown = list(result["metrics"].items())[:4]
                scores = ", ".join(f"{name} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for name, m in shown)
                questions = result["counts"]["questions"]
                beside = "".join(f"; {aside}" for aside in asides(result["counts"]))
                print(
                    f"{name} {task}{suffix}: {questions} questions; {scores or 'answers unknown'}{beside}", flush=True
                )
                if is_submitted:
                    print(f"submission: {harness.write_submission(model, task + suffix)}")
    if IS_FIRST_RANK:
        with progress("comparing the models"):
            compare_models(experiment)


def vary(experiment: Experiment, folders: dict[str, Path], names: list[str]) -> None:
    """Ask each model in all ways that evaluation.protocols names."""
    from qilin_med.evaluate import harness, protocols

    settings = {name: experiment.evaluation.protocols[name] for name in names}
    for name in names:  # a wrong name or path is reported before any model is loaded
        for questions in protocols.protocols_of(name, settings[name]).values():
            harness.describe_task(name, questions)
    for model, folder in folders.items():
        opened = harness.ModelUnderTest(experiment, model, folder)
        for name in names:
            with progress(f"{model} {name}"):
                found = protocols.run_protocols(opened, name, settings[name])
            show(f"{model} {name}", found)


def show(title: str, found: dict[str, Any]) -> None:
    for way, scores in found.get("ways", {}).items():
        value, low, high = (scores["accuracy"][key] for key in ("value", "low", "high"))
        print(f"{title}: {way}: accuracy {value:.3f} [{low:.3f}, {high:.3f}], flips {scores['flips']:.3f}")
    if found.get("ways"):
        print(f"{title}: {found['questions']} questions; from lowest to highest {found['spread']:.3f};"
              f" {found['flips']:.1%} of the answers depend on the protocol", flush=True)  # fmt: skip


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
