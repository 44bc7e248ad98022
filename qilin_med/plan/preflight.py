"""Refuse a run that cannot fit this machine before its model is loaded."""

import shutil
from pathlib import Path

from qilin_med.config.experiment import Experiment, StageName
from qilin_med.errors import UserError
from qilin_med.plan.advice import describe_change
from qilin_med.plan.architecture import read_architecture
from qilin_med.plan.data import Amount
from qilin_med.plan.plan import MARGIN, Machines, StagePlan, plan_stage
from qilin_med.plan.storage import merged_bytes

GIB = 2**30


def local_machine(experiment: Experiment) -> Machines:
    """This machine's CPU ranks, each with its part of the memory that is free."""
    processes = experiment.launch.processes
    ranks = 1 if processes == "auto" else processes
    return Machines(1, ranks, available_memory() / ranks, None)


def available_memory() -> int:
    """Bytes that new processes can have without swapping: the kernel's estimate, or what the container leaves."""
    free = _fields("/proc/meminfo")["MemAvailable:"] * 1024
    control = Path("/sys/fs/cgroup")
    try:
        limit = int((control / "memory.max").read_text())
        used = _fields(control / "memory.stat")["anon"]  # cached files give way
    except (OSError, ValueError, KeyError):  # no container, or none with a limit ("max")
        return free
    return min(free, limit - used)


def _fields(path: str | Path) -> dict[str, int]:
    """Name and number at the start of every line."""
    return {words[0]: int(words[1]) for words in map(str.split, Path(path).read_text().splitlines())}


def check_machine(
    experiment: Experiment, stage: StageName, parent: Path, amount: Amount, ranks: int, nodes: int, gpu_memory: int
) -> str | None:
    """UserError if memory or disk are too small for a stage on `nodes` machines like this one.

    `gpu_memory`: bytes of the smallest GPU. A model whose shape the planner does not know is not refused: then a line says
    so.
    """
    memory = gpu_memory if experiment.launch.device == "cuda" else local_machine(experiment).memory
    machines = Machines(nodes, ranks // nodes, memory, None)
    try:
        architecture = read_architecture(parent)
    except UserError as error:
        return f"memory and disk not checked: {error}"
    plan = plan_stage(experiment, stage, architecture, machines, amount)
    check_memory(plan)
    check_disk(plan, experiment.stage_folder(stage))
    return None


def check_memory(plan: StagePlan) -> None:
    """UserError if even a generous reading of the estimate exceeds what a rank has."""
    if plan.verdict != "does not fit":
        return
    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in plan.memory.parts().items() if value > 0.05 * GIB)
    raise UserError(
        f"{plan.stage} needs about {plan.memory.total / GIB:.1f} GiB a rank ({parts}), {plan.machines.memory / GIB:.1f}"
        f" GiB are there; {describe_change(plan)}; or add --force to try it (scripts/plan.py shows every setting)"
    )


def check_disk(plan: StagePlan, folder: Path) -> None:
    """UserError if the checkpoints and the merged model will not fit on the disk that `folder` lies on."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free + _size_of(folder / "checkpoints")
    if free < plan.disk * (1 - MARGIN):
        raise UserError(
            f"{folder}: {plan.disk / GIB:.1f} GiB needed for {plan.section.keep_checkpoints} + 1 checkpoints and the"
            f" merged model ({merged_bytes(plan.training) / GIB:.1f} GiB), {free / GIB:.1f} GiB free; free the disk, lower"
            f" {plan.stage}.keep_checkpoints or set output_dir; --force tries it nevertheless"
        )


def _size_of(folder: Path) -> int:
    """Bytes that a resumed run's own checkpoints take already."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
