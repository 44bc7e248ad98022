"""Questions per second of the exam protocols, beside other ways to ask the same model the same questions.

    python scripts/benchmark.py evaluate
    python scripts/benchmark.py evaluate --model runs/demo/dpo/merged --questions test.csv --limit 200 --output evaluate.json
    python scripts/benchmark.py evaluate launch.device=cuda model.dtype=bfloat16 evaluation.batch_size=64

"ours" is the path of scripts/evaluate.py: reading the files, asking, scoring, intervals, writing results; "ours, 2 ranks"
the same under torchrun, with the threads dealt out. "HFLM" is ours with lm-evaluation-harness's own model class. "one at a
time" is `model.generate`, greedy, on one prompt of cmexam_generate after the other, which is how published evaluation
scripts ask. Loading the model is in none of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_shared_arguments, describe_moment, write_result
from qilin_med.config.experiment import Experiment, TaskSettings, count, load_experiment
from qilin_med.console.quiet import quiet_libraries
from qilin_med.errors import UserError
from qilin_med.report.tables import markdown_table

TASKS = ("cmexam_letters", "cmexam_options", "cmexam_generate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=ROOT / "runs/demo/sft/merged", help="model folder (default: %(default)s)"
    )
    parser.add_argument(
        "--questions", type=Path, default=ROOT / "data/demo/raw/exams/test.csv",
        help="exam file in CMExam's columns (default: %(default)s)",
    )  # fmt: skip
    for name, default, meaning in (
        ("limit", 256, "questions asked"),
        ("one-at-a-time", 64, "questions asked one at a time"),
        ("max-new-tokens", 64, "of a generated answer"),
        ("ranks", 2, "of ours, all ranks; 1: leave it out"),
    ):
        parser.add_argument(f"--{name}", type=count, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of evaluation.json")
    add_shared_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    for name in ("model", "questions"):
        if not (path := getattr(arguments, name)).exists():
            raise UserError(f"--{name}: {path} does not exist; run `bash run_all.sh` for the demo's, or name yours")
    settings = Path(__file__).with_suffix(".json")
    experiment = load_experiment(settings, [f"model.path={arguments.model}", *arguments.overrides])
    quiet_libraries()
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as folder:
        if "RANK" in os.environ:  # under torchrun, started by the first process's measure_ranks
            rates = {"ours": time_tasks(arguments, experiment, Path(folder))[1]}
            if int(os.environ["RANK"]):
                return
        else:
            rates = measure(arguments, experiment, Path(folder))
    rows = []
    for way, of_task in rates.items():
        others = rates.get("one at a time", of_task)
        cells = {task: f"{rate:.4g} ({rate / others[task]:.2g} x)" for task, rate in of_task.items()}
        rows.append({"questions/s": way, **cells})
    print(
        f"{markdown_table(rows)}\n\n{arguments.model}, {arguments.limit} questions, batches of"
        f" {experiment.evaluation.batch_size}, at most {arguments.max_new_tokens} new tokens, {arguments.threads} threads;"
        f" {describe_moment()}"
    )
    write_result(arguments, questions_per_second=rates)


def measure(arguments: argparse.Namespace, experiment: Experiment, work: Path) -> dict[str, dict[str, float]]:
    """{way: {task: questions per second}}."""
    from lm_eval.models.huggingface import HFLM

    from qilin_med.evaluate.harness import ModelUnderTest
    from qilin_med.evaluate.results import read_samples

    class Plain(ModelUnderTest):
        def open_hf(self) -> Any:
            ours = super().open_hf()
            return HFLM(pretrained=ours.model, tokenizer=self.tokenizer, batch_size=ours.batch_size)

    model, ours = time_tasks(arguments, experiment, work / "ours")
    prompts = [sample["prompt"] for sample in read_samples(model.results / "cmexam_generate")]
    rate = time_one_at_a_time(model.lm.lm, prompts[: arguments.one_at_a_time], arguments)
    rates = {"ours": ours, "one at a time": dict.fromkeys(TASKS, rate)}
    rates["HFLM"] = time_tasks(arguments, experiment, work / "HFLM", Plain)[1]
    if arguments.ranks > 1:
        rates[f"ours, {arguments.ranks} ranks"] = measure_ranks(arguments, work / "ranks.json")
    return rates


def measure_ranks(arguments: argparse.Namespace, output: Path) -> dict[str, float]:
    """Questions per second of this script's ranks together."""
    threads = max(arguments.threads // arguments.ranks, 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={arguments.ranks}"]
    command = [*launcher, *sys.argv, f"--threads={threads}", f"--output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text(encoding="utf-8"))["questions_per_second"]["ours"]


def time_tasks(
    arguments: argparse.Namespace, experiment: Experiment, folder: Path, kind: Any = None
) -> tuple[Any, dict[str, float]]:
    """(the model under test, of class `kind` or ours; {task: questions per second}). The first rank counts for all."""
    import lm_eval.evaluator  # noqa: F401 (seconds, once in a process)

    from qilin_med.evaluate.harness import ModelUnderTest, run_task

    task = TaskSettings(test=[str(arguments.questions)], limit=arguments.limit)
    generated = task.model_copy(update={"max_new_tokens": arguments.max_new_tokens})
    tasks = {name: generated if name == "cmexam_generate" else task for name in TASKS}
    experiment = experiment.model_copy(update={"output_dir": str(folder)})
    model, rates = (kind or ModelUnderTest)(experiment, "sft", arguments.model), {}
    _ = model.lm.max_length  # loads the model
    for name in TASKS:
        start = time.perf_counter()
        result = run_task(model, name, tasks[name])
        rates[name] = (result["counts"]["questions"] if result else 0) / (time.perf_counter() - start)
    return model, rates


def time_one_at_a_time(lm: Any, prompts: list[str], arguments: argparse.Namespace) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        inputs = lm.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(lm.device)
        output = lm.model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        lm.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return len(prompts) / (time.perf_counter() - start)
