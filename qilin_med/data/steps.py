"""Steps of many tasks on datatrove's executors: processes of this machine, Slurm, or Ray."""

import os
import resource
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qilin_med.config.corpus import ExecutorSettings
from qilin_med.console.progress import progress, tally
from qilin_med.data.processes import run_all
from qilin_med.errors import UserError


@dataclass(frozen=True)
class Step:
    """A function of a task's number, run `tasks` times; datatrove calls it as a pipeline of one."""

    name: str
    tasks: int
    function: Callable[[int], Any]
    size: Callable[[], int] | None = None
    """Bytes that all tasks read, as `tally` counts them: asked when the step begins."""

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        start = time.process_time()
        self.function(rank)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        tally.add(cpu_seconds=time.process_time() - start, peak_bytes=peak)


def run_steps(steps: list[Step], settings: ExecutorSettings, log: Path) -> None:
    """Run steps, each of which needs the ones before it; tasks that are done by the marks in `log` are left out.

    On Slurm this submits a chain of jobs and returns. UserError: options that the executor does not take.
    """
    try:
        executors = [executor_of(step, settings, str(log / step.name)) for step in steps]
    except TypeError as error:
        raise UserError(f"executor.options do not fit datatrove's {settings.kind} executor: {error}") from None
    if settings.kind == "slurm":
        for earlier, later in pairwise(executors):
            later.depends = earlier
        executors[-1].run()
        return
    for step, executor in zip(steps, executors, strict=True):
        with tasks_counted(log / step.name / "completions", step):
            if settings.kind == "local":
                # datatrove's own pool of processes waits for ever when one of them is killed.
                run_all(executor._run_for_rank, executor.get_incomplete_ranks(), executor.workers)
            else:
                executor.run()


def executor_of(step: Step, settings: ExecutorSettings, log: str) -> Any:
    """datatrove's executor for one step. A cluster runs all tasks at once unless `workers` says how many."""
    shared = {"pipeline": [step], "tasks": step.tasks, "logging_dir": log}
    if settings.kind == "local":
        from datatrove.executor.local import LocalPipelineExecutor
        from loguru import logger

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are what runs in parallel
        logger.disable("datatrove")  # its banners; errors come back as exceptions
        workers = len(os.sched_getaffinity(0)) if settings.workers == "auto" else settings.workers
        return LocalPipelineExecutor(**shared, workers=min(workers, step.tasks), **settings.options)
    shared["workers"] = -1 if settings.workers == "auto" else settings.workers
    if settings.kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        # The jobs see what this process sees: its environment's commands, and this package.
        paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(__file__).resolve().parents[2]}
        environment = " && ".join(f"export {name}={shlex.quote(str(path))}:${name}" for name, path in paths.items())
        defaults = {"job_name": step.name, "slurm_logs_folder": f"{log}/slurm", "env_command": environment}
        return SlurmPipelineExecutor(**shared, **{**defaults, **settings.options})
    try:
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise UserError("executor.kind is ray, but ray is not installed: .venv/bin/pip install ray") from None
    return RayPipelineExecutor(**shared, **settings.options)


@contextmanager
def tasks_counted(marks: Path, step: Step) -> Iterator[None]:
    """A line at the end of each step, and until then the bytes that its tasks have read, or its tasks by datatrove's
    marks."""
    ended, start = threading.Event(), time.monotonic()
    total, unit = (step.size(), "B") if step.size else (step.tasks, "tasks")
    tally.clear()

    def done() -> int:
        return sum(1 for _ in marks.glob("*"))

    before = total * done() // step.tasks  # by an earlier call

    def watch() -> None:
        counted = before
        while not ended.wait(0.5):
            now = min(before + int(tally.read()[0]), total) if step.size else done()
            advance(now - counted)
            counted = now

    with progress(step.name, total, unit, before) as advance:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(2)  # no longer, as a worker that was killed may hold the tally's lock
    seconds, (size, cpu_seconds, peak_bytes) = time.monotonic() - start, tally.read()
    rate = f" {size / 1e6 / seconds:8.1f} MB/s" if step.size else ""
    print(f"{step.name:<12}{done():>6} of {step.tasks} tasks {seconds:8.1f} s {cpu_seconds:8.1f} CPU s"
          f" {peak_bytes / 2**20:6.0f} MiB{rate}", flush=True)  # fmt: skip
