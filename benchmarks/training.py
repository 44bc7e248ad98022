"""Compare each stage's training with other ways to train, on this machine: same rows, same model, one run.

    python scripts/benchmark.py train
    python scripts/benchmark.py train --only sft,dpo --steps 12 --output train.json \\
        --tokenizer models/baichuan-7b --data sft=chats.jsonl dpo=pairs.jsonl cpt=texts.jsonl:content

Without --data and --tokenizer it takes the demo world (scripts/make_demo.py writes it). The model is a random Llama of
37.6M parameters with a vocabulary of 64k, in fp32 on the CPU, in one process. Every contender runs in a process of its
own, in turns, --repeats times; the best rate counts, as whatever else the machine does can only slow one down.
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

from benchmarks.contenders import CONTENDERS
from benchmarks.machine import describe_machine
from qilin_med.artifact import commit, versions
from qilin_med.config.experiment import Experiment
from qilin_med.errors import UserError
from qilin_med.train.job import Job
from qilin_med.train.stage import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"cpt": "pretraining", "sft": "sft", "dpo": "dpo"}
UNITS = {"cpt": "tokens/s", "sft": "tokens/s", "dpo": "pairs/s"}
WARMUP = 2  # updates before the clock starts
VOCABULARY = 64_000
NOTES = {
    "ours": "the stage script's trainer",
    "bare loop": "PyTorch alone, packed rows, logits at targets only, no activation checkpointing",
    "TRL SFTTrainer": "its defaults: padded to the longest, activation checkpointing",
    "TRL SFTTrainer, packing": "its defaults: best-fit rows flattened to one line, activation checkpointing",
    "TRL DPOTrainer": "its defaults: reference pass in the step, no dropout, activation checkpointing",
    "predecessor": "transformers' Trainer: padded to the longest, all logits, activation checkpointing",
    "two models": "transformers' Trainer: policy and frozen copy, all logits, activation checkpointing",
}


def add_arguments(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--data", nargs="+", default=[str(ROOT / "data/demo/processed")], metavar="DATA",
        help="STAGE=PATH (STAGE is cpt, sft or dpo; cpt=PATH:FIELD names the text field of a JSON file), or a folder that"
        " holds folders pretraining, sft and dpo (default: data/demo/processed)",
    )  # fmt: skip
    train.add_argument(
        "--tokenizer", type=Path, default=ROOT / "models/demo-init", help="model folder (default: models/demo-init)"
    )
    train.add_argument("--only", default="cpt,sft,dpo", help="stages, comma-separated (default: %(default)s)")
    train.add_argument("--steps", type=int, default=8, help="timed steps (default: %(default)s)")
    train.add_argument("--repeats", type=int, default=2, help="turns of every contender (default: %(default)s)")
    train.add_argument("--threads", type=int, default=2, help="threads of the process (default: %(default)s)")
    train.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="time by the wall clock, or by the process's CPU clock: with --threads 1 that is the one to trust on a"
        " machine that others use (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--output", type=Path, help="write the result as JSON")


def check_arguments(arguments: argparse.Namespace) -> list[str]:
    """The stages asked for."""
    stages = arguments.only.split(",")
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"--only: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(STAGES)}")
    for name in ("steps", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; expected 1 or more")
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer: {arguments.tokenizer} holds no tokenizer.json; run scripts/make_demo.py, or name"
                        " a model folder")  # fmt: skip
    if arguments.output and not arguments.output.parent.is_dir():
        raise UserError(f"--output: {arguments.output.parent} is no folder; make it first")
    return stages


def sources_of(data: list[str], stage: str) -> list[dict[str, str]]:
    """The entries of --data that are a stage's, as an experiment file names them."""
    sources = []
    for entry in data:
        name, equals, path = entry.partition("=")
        if not equals:
            sources.append({"path": str(Path(entry) / STAGES[stage])})
        elif name not in STAGES:
            raise UserError(f"--data {entry}: expected a folder, or one of {', '.join(STAGES)} before the '='")
        elif name == stage:
            path, colon, field = path.partition(":")
            sources.append({"path": path, "text": field} if colon else {"path": path})
    if not sources:
        raise UserError(f"--data names nothing for {stage}; add {stage}=PATH, or leave it out of --only")
    return sources


def describe_experiment(stages: list[str], arguments: argparse.Namespace, work: Path) -> Experiment:
    shared = {
        "epochs": 1, "learning_rate": 1e-4, "warmup_ratio": 0.0, "weight_decay": 0.0, "report_to": [],
        "checkpoint_minutes": None, "parent": str(work / "model"),
    }  # fmt: skip
    limits = {"max_source_length": 256, "max_target_length": 256}
    lora = {"rank": 8, "alpha": 32, "dropout": 0.05}
    settings = {
        "cpt": {"block_size": 512, "batch_size_per_device": 4},
        "sft": {**limits, "batch_size_per_device": 8, "lora": lora},
        "dpo": {**limits, "beta": 0.1, "batch_size_per_device": 4, "lora": lora},
    }
    sections = {STAGES[s]: {**shared, **settings[s], "data": sources_of(arguments.data, s)} for s in stages}
    return Experiment(
        name="benchmark",
        seed=42,
        output_dir=str(work),
        model={"path": str(work / "model"), "template": "qilin", "dtype": "float32"},
        launch={"device": "cpu", "processes": 1, "threads_per_process": arguments.threads},
        **sections,
    )


def make_model(tokenizer_folder: Path, folder: Path) -> int:
    """Write the random model with its tokenizer; returns its parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=448, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if len(tokenizer) > VOCABULARY:
        raise UserError(f"--tokenizer: {tokenizer_folder} has {len(tokenizer)} tokens, more than {VOCABULARY}")
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_job(experiment: Experiment, stage: str, updates: int, work: Path) -> Job:
    """A job over as many rows, drawn at random, as `updates` steps take."""
    import numpy as np

    from qilin_med.data.rows import open_rows, prepare_rows
    from qilin_med.model.load import load_tokenizer

    name, section = STAGES[stage], experiment.stage(STAGES[stage])
    tokenizer = load_tokenizer(work / "model", experiment.model.template)
    prepared = prepare_rows(name, section, tokenizer, None, work / "cache")
    wanted = updates * section.batch_size_per_device
    if len(prepared.dataset) < wanted:
        raise UserError(f"{stage}: the data give {len(prepared.dataset)} rows, {wanted} are needed; lower --steps")
    # Sorted, as the rows of a whole run would lie.
    drawn = np.sort(np.random.default_rng(0).permutation(len(prepared.dataset))[:wanted])
    rows = write_rows(prepared.dataset, drawn.tolist(), work / f"{name}-rows")
    assert len(open_rows(rows).dataset) == wanted, rows
    return Job(experiment, name, work / "model", "benchmark", rows, wanted, ranks=1)


def write_rows(dataset: Any, drawn: list[int], folder: Path) -> Path:
    import pyarrow as pa

    from qilin_med.artifact import MANIFEST, commit_folder
    from qilin_med.data.rows import ROWS

    table = dataset.with_format("arrow")[drawn]
    folder.mkdir()
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    commit_folder(folder, MANIFEST, {"counts": {}})
    return folder


def measure(job_file: Path, contender: str, threads: int, result: Path) -> dict[str, Any]:
    """Run one contender in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure",
        str(job_file),
        contender,
        str(WARMUP),
        str(result),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{contender} failed with exit code {run.returncode}:\n{run.stdout}{run.stderr}")
    return json.loads(result.read_text(encoding="utf-8"))


def measure_stage(job: Job, stage: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All contenders in turns, so that a slow spell of the machine does not meet one alone."""
    job_file = work / f"{job.stage}.json"
    job.folder.mkdir(exist_ok=True)
    job.save(job_file)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS[job.stage]}
    for turn in range(arguments.repeats):
        for name, measured in runs.items():
            measured.append(measure(job_file, name, arguments.threads, work / "result.json"))
            measured[-1]["load_after"] = os.getloadavg()[0]
            rate, memory = measured[-1]["rates"][arguments.clock], measured[-1]["memory"] / 2**30
            print(
                f"{stage} {turn + 1}/{arguments.repeats} {name}: {rate:.4g} {UNITS[stage]}, {memory:.2f} GiB",
                flush=True,
            )
    return {
        "unit": UNITS[stage],
        "rows": job.row_count,
        "contenders": {n: summarise(n, m, arguments.clock) for n, m in runs.items()},
    }


def summarise(name: str, measured: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    return {
        "rate": max(run["rates"][clock] for run in measured),
        "memory": max(run["memory"] for run in measured),
        "how": NOTES[name],
        "runs": measured,
    }


def format_table(stages: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| stage | contender | rate | ours against it | peak memory, GiB | ours against it | how it runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, result in stages.items():
        ours = result["contenders"]["ours"]
        for name, other in result["contenders"].items():
            rate, memory = ours["rate"] / other["rate"], ours["memory"] / other["memory"]
            lines.append(
                f"| {stage} | {name} | {other['rate']:.4g} {result['unit']} | {rate:.2f} x |"
                f" {other['memory'] / 2**30:.2f} | {memory:.2f} x | {other['how']} |"
            )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    stages = check_arguments(arguments)
    started, load = time.strftime("%Y-%m-%d %H:%M:%S %z"), os.getloadavg()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="qilin-med-benchmark-") as folder:
        work = Path(folder)
        experiment = describe_experiment(stages, arguments, work)
        parameters = make_model(arguments.tokenizer, work / "model")
        jobs = {stage: make_job(experiment, stage, WARMUP + arguments.steps, work) for stage in stages}
        results = {stage: measure_stage(job, stage, arguments, work) for stage, job in jobs.items()}
    machine = describe_machine()
    print(
        f"\n{format_table(results)}\n\n{started}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB;"
        f" {parameters:,} parameters in fp32, {arguments.threads} threads; {arguments.steps} updates, best of"
        f" {arguments.repeats} by the {arguments.clock} clock; load before {load[0]:.1f}"
    )
    if arguments.output:
        about = {
            "started": started, "machine": machine, "load_before": load, "clock": arguments.clock, "threads": arguments.threads,
            "parameters": parameters, "warmup": WARMUP, "steps": arguments.steps, "repeats": arguments.repeats,
            "versions": versions(), "commit": commit(),
        }  # fmt: skip
        text = json.dumps({**about, "stages": results}, ensure_ascii=False, indent=2)
        arguments.output.write_text(text + "\n", encoding="utf-8")
