"""Stages with real ranks, cheaply: each rank is forked from a server that has imported the libraries once, since a new
interpreter needs 10 s of CPU for that. The variables are those that srun and DeepSpeed's launcher set, too."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from qilin_med.config.experiment import load_experiment
from qilin_med.console.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"pretraining": "pretraining.py", "sft": "supervised_finetuning.py", "dpo": "dpo_training.py"}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["deepspeed", "peft.tuners.lora", "trl.trainer.dpo_trainer", "qilin_med.train.trainers"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_script(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_stage(settings: Path, stage: str, *overrides: str) -> Path:
    """Run a stage of a settings file as its script would; returns the stage's folder."""
    quiet_libraries()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    experiment = load_experiment(settings, overrides)
    script, ranks = [str(ROOT / SCRIPTS[stage]), "--config", str(settings), *overrides], experiment.launch.processes
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(_CONTEXT.Process(target=_run_script, args=(script, environment)))
        processes[-1].start()
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.02)
    assert [process.exitcode for process in processes] == [0] * ranks
    return experiment.stage_folder(stage)
