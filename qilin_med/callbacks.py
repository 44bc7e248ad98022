"""What happens around the updates: stop cleanly, refuse to go on with NaN, seal checkpoints, write and show numbers."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback

from qilin_med.checkpoints import COMPLETE, disk_errors_explained, prune_checkpoints, seal_folder
from qilin_med.errors import UserError
from qilin_med.job import Job
from qilin_med.results import read_metrics


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


class Guard(TrainerCallback):
    """Stops all ranks together: after a signal with a checkpoint, on a loss that is not finite with an error."""

    def __init__(self, job: Job, trainer: Any) -> None:
        self.job, self.trainer = job, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)

    def _request_stop(self, _number: int, _frame: object) -> None:
        self.trainer.stop_requested = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate does not reach the sampler through the wrappers that it uses after a resume.
        self.trainer.step_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stop_agreed:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        # Every rank sees the same global loss and norm here, before a checkpoint of this update could be written.
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UserError(self._explain_non_finite(name, logs[name], state.global_step))

    def _explain_non_finite(self, name: str, value: float, step: int) -> str:
        indices = sorted({i for batch in self.trainer.seen_rows for i in batch.tolist()})
        ids = [i for row in self.trainer.train_dataset[indices]["ids"] for i in row]
        if dist.is_initialized():
            everyone: list[list[str]] = [[]] * dist.get_world_size()
            dist.all_gather_object(everyone, ids)
            ids = [i for part in everyone for i in part]
        good = sorted(self.job.checkpoints.glob(f"checkpoint-*/{COMPLETE}"), key=lambda p: p.stat().st_mtime)
        last = good[-1].parent if good else "none"
        return (
            f"{name} became {value} at step {step}: stopped, nothing of this step is kept. Last good checkpoint: {last}."
            f" Rows of the step: {', '.join(ids)}. Lower {self.job.stage}.learning_rate or look at these rows"
        )


class Checkpoints(TrainerCallback):
    """Saves when it is due, and makes a checkpoint count once every rank has written its part."""

    def __init__(self, job: Job, trainer: Any) -> None:
        self.job, self.trainer = job, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_save = time.monotonic()
        if state.is_world_process_zero:
            self.trainer.save_is_due = self._minutes_are_over

    def _minutes_are_over(self) -> bool:
        minutes = self.job.section.checkpoint_minutes
        return minutes is not None and time.monotonic() - self.last_save >= 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.job.section.checkpoint_every
        updates_are_over = every is not None and state.global_step % every == 0
        if self.trainer.save_agreed or updates_are_over or state.global_step >= state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = self.job.checkpoints / f"checkpoint-{state.global_step}"
            with disk_errors_explained(checkpoint):
                facts = {"step": state.global_step, "job": self.job.fingerprint(), "ranks": self.job.ranks}
                seal_folder(checkpoint, COMPLETE, facts)
            prune_checkpoints(self.job.checkpoints, self.job.section.keep_checkpoints)
        wait_for_all()
        self.last_save = time.monotonic()


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line per update. After a resume the lines past the checkpoint are cut off and come again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_time = time.monotonic()
        if state.is_world_process_zero and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        state.log_history.clear()  # the file is the record; trainer_state.json would grow with every update
        if not state.is_world_process_zero or "loss" not in logs:
            return
        now = time.monotonic()
        row = {"step": state.global_step, **logs, "seconds": round(now - self.last_time, 4)}
        self.last_time = now
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Progress(TrainerCallback):
    """One bar with loss, learning rate, useful tokens per second and time left; lines instead where no terminal is."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.speaks = state.is_world_process_zero
        self.on_terminal = sys.stderr.isatty()
        self.start, self.first_step, self.tokens = time.monotonic(), state.global_step, 0
        self.last_line = self.start
        if self.speaks and self.on_terminal:
            layout = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.bar = tqdm(**steps, bar_format=layout, dynamic_ncols=True, disable=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if not self.speaks or "loss" not in logs:
            return
        self.tokens += logs["tokens"]
        elapsed = time.monotonic() - self.start
        numbers = f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.2e}, {self.tokens / elapsed:,.0f} tokens/s"
        if "rewards/accuracy" in logs:
            numbers += f", margin {logs['rewards/margin']:.3f}"
        if self.on_terminal:
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif self._line_is_due(state):
            left = elapsed / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
            print(f"step {state.global_step}/{state.max_steps}: {numbers}, {_minutes(left)} left", flush=True)

    def _line_is_due(self, state: Any) -> bool:
        """About a line every ten seconds, beside the first and the last."""
        now = time.monotonic()
        due = now - self.last_line > 10 or state.global_step in (self.first_step + 1, state.max_steps)
        if due:
            self.last_line = now
        return due

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.speaks and self.on_terminal:
            self.bar.close()


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def end_rank() -> None:
    """Leave without the interpreter's shutdown, once all ranks are done and all is on disk.

    gloo's own threads (pt_gloo_runloop) are still running then, even after destroy_process_group, since DeepSpeed holds
    on to its groups; now and then one of them is joinable when static objects go, and the process aborts ("terminate
    called without an active exception"). Nothing is left to do at this point but to end.
    """
    wait_for_all()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
