"""Stages with real ranks, cheaply: a rank is forked from a server that has imported the libraries once.

Preparing, watching, sealing and publishing are the pipeline's own code; only how qilin_med.train.launch starts a process is
replaced, since a new interpreter needs 10 s of CPU for its imports.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from qilin_med.train.nodes import Place

from qilin_med.config.experiment import load_experiment
from qilin_med.train import stage as training

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"pretraining": "pretraining.py", "sft": "supervised_finetuning.py", "dpo": "dpo_training.py"}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["deepspeed", "peft.tuners.lora", "trl.trainer.dpo_trainer", "qilin_med.train.trainers"]
)


class ForkedRank:
    """What qilin_med.train.launch uses of subprocess.Popen."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        self._process = _CONTEXT.Process(target=_run_script, args=(command[1:], env))
        self._process.start()
        self.kill = self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)


def _run_script(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_stage(settings: Path, stage: str, *overrides: str) -> Path:
    """Run a stage of a settings file as its script would; returns the stage's folder."""
    training.quiet_libraries()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    experiment = load_experiment(settings, overrides)
    script = [str(ROOT / SCRIPTS[stage])]
    forking = SimpleNamespace(Popen=ForkedRank, DEVNULL=None)
    with mock.patch("qilin_med.train.launch.subprocess", forking), mock.patch.object(sys, "argv", script):
        training._take_part(experiment, stage, Place(), restart=False, force=False)
    return experiment.stage_folder(stage)
