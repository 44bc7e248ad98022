"""What happens around the optimizer steps: stop cleanly, refuse to go on with NaN, save checkpoints, write and show numbers."""

import json
import math
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from qilin_med.artifact import commit_folder, disk_errors_explained, write_text
from qilin_med.console.progress import progress
from qilin_med.errors import UserError
from qilin_med.train.checkpoints import COMPLETE, prune_checkpoints
from qilin_med.train.job import Job
from qilin_med.train.metrics import read_metrics


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


class Checkpoints(TrainerCallback):
    """Saves when it is due, and commits in the background what all ranks have written: training waits for the write alone.

    An error met in the background (a full disk) is raised after the next step, or at the end of the `with` block in
    which training runs and behind which no thread is left.
    """

    def __init__(self, job: Job, trainer: Any) -> None:
        self.job, self.trainer = job, trainer
        self.committed: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Return once the last checkpoint is committed; raises what went wrong."""
        if self.committed:
            with progress("committing the checkpoint"):
                self.committed.result()
            self.committed = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_save, minutes = time.monotonic(), self.job.section.checkpoint_minutes
        if state.is_world_process_zero and minutes is not None:
            self.trainer.save_is_due = lambda: time.monotonic() - self.last_save >= 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.job.section.checkpoint_every
        ends = state.global_step >= state.max_steps or self.trainer.stop_agreed
        if ends or self.trainer.save_agreed or (every and state.global_step % every == 0):
            control.should_save = True
            self.wait()  # or two checkpoints more than keep_checkpoints would need room
        elif self.committed and self.committed.done():
            self.wait()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_save = time.monotonic()
        if state.is_world_process_zero:
            pool = ThreadPoolExecutor(max_workers=1)
            self.committed = pool.submit(self._commit, state.global_step)
            pool.shutdown(wait=False)  # the thread ends with its work

    def _commit(self, step: int) -> None:
        checkpoint = self.job.checkpoints / f"checkpoint-{step}"
        with disk_errors_explained(checkpoint):
            facts = {"step": step, "job": self.job.fingerprint(), "ranks": self.job.schedule.ranks}
            commit_folder(checkpoint, COMPLETE, facts)
        prune_checkpoints(self.job.checkpoints, self.job.section.keep_checkpoints)


class Guard(TrainerCallback):
    """Stops all ranks together: after a signal once a checkpoint is saved, on a loss that is not finite with an error."""

    def __init__(self, job: Job, trainer: Any, checkpoints: Checkpoints) -> None:
        self.job, self.trainer, self.checkpoints = job, trainer, checkpoints
        self.stopped_by = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)

    def _request_stop(self, number: int, _frame: object) -> None:
        self.trainer.stop_requested = True
        self.stopped_by = "the user" if number == signal.SIGINT else "SIGTERM"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stop_agreed:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        # Every rank sees the same global loss and norm here, before a checkpoint of this step could be written.
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UserError(self._explain_non_finite(name, logs[name], state.global_step))

    def _explain_non_finite(self, name: str, value: float, step: int) -> str:
        self.checkpoints.wait()
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


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line per optimizer step. After a resume the lines past the checkpoint are cut off and come again.

    `seconds` of a row is all the time since the one before, `checkpoint_seconds` the part of it for which training waited
    for a checkpoint. The row of a step that is saved is on disk before its checkpoint can count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_time = time.monotonic()
        if state.is_world_process_zero and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            with disk_errors_explained(self.path):
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_end = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        state.log_history.clear()  # the file is the record; trainer_state.json would grow with every step
        if state.is_world_process_zero and "loss" in logs:
            self.row = {"step": state.global_step, **logs}
            if not control.should_save:
                self._write()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.row["checkpoint_seconds"] = round(time.monotonic() - self.step_end, 4)
            self._write()

    def _write(self) -> None:
        now = time.monotonic()
        self.row["seconds"] = round(now - self.last_time, 4)
        self.last_time = now
        with disk_errors_explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.row) + "\n")
            if "checkpoint_seconds" in self.row:
                file.flush()
                os.fsync(file.fileno())


class Progress(TrainerCallback):
    """How far the training is, with loss, learning rate and useful tokens per second. `starting`: what is shown while
    libraries, model and checkpoint load; it ends here."""

    def __init__(self, starting: ExitStack) -> None:
        self.starting = starting

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.starting.close()
        self.start, self.first_step, self.tokens = time.monotonic(), state.global_step, 0
        self.shown = ExitStack()
        if state.is_world_process_zero:
            steps = progress("training", state.max_steps, "steps", done=state.global_step)
            self.advance = self.shown.enter_context(steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.tokens += logs["tokens"]
        rate = self.tokens / (time.monotonic() - self.start)
        numbers = f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.2e}, {rate:,.0f} tokens/s"
        if "rewards/accuracy" in logs:
            numbers += f", margin {logs['rewards/margin']:.3f}"
        self.advance(1, numbers, now=state.global_step in (self.first_step + 1, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.shown.close()
