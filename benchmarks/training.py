"""Compare each stage's training with other ways to train, on this machine: same rows, same model, one run.

    python scripts/benchmark.py train
    python scripts/benchmark.py train --only sft,dpo --steps 12 --output train.json --tokenizer models/baichuan-7b \\
        'sft.data=["chats.jsonl"]' 'dpo.data=["pairs.jsonl"]'

training.json beside this file has the settings, which overrides change as in any experiment file; by itself it takes the demo
world (scripts/make_demo.py and build_chimed.py write it). The model is a random Llama of 37.6M parameters with a vocabulary of
64k (model.json), in fp32 on the CPU, in one process. Every contender runs in a process of its own, in turns, --repeats times;
the best rate counts, as whatever else the machine does can only slow one down.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_shared_arguments, describe_moment, fresh_processes, write_result
from qilin_med.config.experiment import STAGES, Experiment, StageName, count, load_experiment
from qilin_med.config.schedule import make_schedule
from qilin_med.console.quiet import quiet_libraries
from qilin_med.errors import UserError
from qilin_med.report.tables import markdown_table
from qilin_med.train.job import Job

HERE = Path(__file__).parent
UNITS = {"pretraining": "tokens/s", "sft": "tokens/s", "dpo": "pairs/s"}
WARMUP = 2  # optimizer steps before the clock starts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of training.json")
    demo = ROOT / "models/demo-init"
    parser.add_argument("--tokenizer", type=Path, default=demo, help="model folder (default: models/demo-init)")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=8, help="timed optimizer steps (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=2, help="turns of every contender (default: %(default)s)")
    add_shared_arguments(parser)


def make_model(tokenizer_folder: Path, folder: Path) -> int:
    """Write the random model with its tokenizer; returns its parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer, config = AutoTokenizer.from_pretrained(tokenizer_folder), LlamaConfig.from_json_file(HERE / "model.json")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"--tokenizer: {tokenizer_folder} has {len(tokenizer)} tokens, more than {config.vocab_size}")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def make_job(experiment: Experiment, stage: StageName, steps: int, work: Path) -> Job:
    """A job over as many rows, drawn at random, as `steps` optimizer steps take."""
    import numpy as np

    from qilin_med.artifact import MANIFEST, commit_folder
    from qilin_med.data.rows import ROWS, prepare_rows
    from qilin_med.model.load import load_tokenizer

    section = experiment.stage(stage)
    tokenizer = load_tokenizer(work / "model", experiment.model.template)
    dataset = prepare_rows(stage, section, tokenizer, None, work / "cache").dataset
    wanted, rows = steps * section.batch_size_per_device, work / f"{stage}-rows"
    if len(dataset) < wanted:
        raise UserError(f"{stage}: the data give {len(dataset)} rows, {wanted} are needed; lower --steps")
    # Sorted, as the rows of a whole run would lie.
    drawn = np.sort(np.random.default_rng(0).permutation(len(dataset))[:wanted])
    rows.mkdir()
    dataset.select(drawn).flatten_indices(cache_file_name=str(rows / ROWS))
    commit_folder(rows, MANIFEST, {"counts": {}})
    return Job(experiment, stage, work / "model", "benchmark", rows, make_schedule(stage, section, wanted, ranks=1))


def measure_stage(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turns, each in its own process, so that a slow spell of the machine does not meet one alone."""
    from benchmarks.contenders import CONTENDERS, measure

    job.folder.mkdir(exist_ok=True)
    stage, unit = job.stage, UNITS[job.stage]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS[stage]}
    for turn in range(arguments.repeats):
        for name, measured in runs.items():
            with fresh_processes(1) as pool:
                measured.append(pool.submit(measure, job, name, WARMUP).result())
            measured[-1]["load_after"] = os.getloadavg()[0]
            told = f"{measured[-1]['rate']:.4g} {unit}, {measured[-1]['memory'] / 2**30:.2f} GiB"
            print(f"{stage} {turn + 1}/{arguments.repeats} {name}: {told}", flush=True)
    best = {
        name: {
            "rate": max(run["rate"] for run in measured),
            "memory": max(run["memory"] for run in measured),
            "how": CONTENDERS[stage][name].__doc__,
            "runs": measured,
        }
        for name, measured in runs.items()
    }
    return {"unit": unit, "rows": job.schedule.rows, "contenders": best}


def table_rows(stage: str, result: dict[str, Any]) -> Iterator[dict[str, str]]:
    ours = result["contenders"]["ours"]
    for name, other in result["contenders"].items():
        yield {
            "stage": stage,
            "contender": name,
            "rate": f"{other['rate']:.4g} {result['unit']}",
            "our rate against it": f"{ours['rate'] / other['rate']:.2f} x",
            "peak memory, GiB": f"{other['memory'] / 2**30:.2f}",
            "our memory against it": f"{ours['memory'] / other['memory']:.2f} x",
            "how it runs": other["how"],
        }


def run(arguments: argparse.Namespace) -> None:
    stages = arguments.only.split(",")
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(STAGES)}")
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer: {arguments.tokenizer} holds no tokenizer.json; run scripts/make_demo.py, or name"
                        " a model folder")  # fmt: skip
    moment = describe_moment()
    quiet_libraries()
    # Of the processes started below:
    os.environ.update(OMP_NUM_THREADS=str(arguments.threads), TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as folder:
        work = Path(folder)
        places = [f"output_dir={work}", f"model.path={work / 'model'}"]
        overrides = [*places, f"launch.threads_per_process={arguments.threads}", *arguments.overrides]
        experiment = load_experiment(HERE / "training.json", overrides)
        parameters = make_model(arguments.tokenizer, work / "model")
        jobs = {stage: make_job(experiment, stage, WARMUP + arguments.steps, work) for stage in stages}
        results = {stage: measure_stage(job, arguments) for stage, job in jobs.items()}
    rows = [row for stage, result in results.items() for row in table_rows(stage, result)]
    print(
        f"\n{markdown_table(rows)}\n\n{moment} before; {parameters:,} parameters in fp32, {arguments.threads} threads;"
        f" {arguments.steps} optimizer steps, best of {arguments.repeats}"
    )
    write_result(arguments, started=moment, parameters=parameters, warmup=WARMUP, stages=results)
