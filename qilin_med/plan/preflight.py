"""Refuse a run that cannot fit this machine before its model is loaded."""

import shutil
from pathlib import Path

from qilin_med.config.experiment import Experiment, StageName
from qilin_med.errors import UserError
from qilin_med.plan.advice import describe_change
from qilin_med.plan.data import Amount
from qilin_med.plan.machines import GIB, Machines, local_machine
from qilin_med.plan.measure import Unmeasured
from qilin_med.plan.plan import MARGIN, StagePlan, plan_stage


def check_machine(
    experiment: Experiment, stage: StageName, parent: Path, amount: Amount, ranks: int, nodes: int, gpu_memory: int
) -> str | None:
    """UserError if memory or disk are too small for a stage on `nodes` machines like this one.

    `gpu_memory`: bytes of the smallest GPU. A model that cannot be measured is not refused: then a line says so.
    """
    memory = gpu_memory if experiment.launch.device == "cuda" else local_machine(experiment).memory
    try:
        plan = plan_stage(experiment, stage, parent, Machines(nodes, ranks // nodes, memory), amount)
    except Unmeasured as error:
        return f"memory and disk not checked: {error}"
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
    free = free_bytes(folder)
    if free < plan.disk * (1 - MARGIN):
        raise UserError(
            f"{folder}: {plan.disk / GIB:.1f} GiB needed for {plan.section.keep_checkpoints} + 1 checkpoints and the"
            f" merged model ({plan.merged_bytes / GIB:.1f} GiB), {free / GIB:.1f} GiB free; free the disk, lower"
            f" {plan.stage}.keep_checkpoints or set output_dir; --force tries it nevertheless"
        )


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies or will lie on. Its checkpoints count as room: a resumed run replaces them."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    checkpoints = (file.stat().st_size for file in folder.glob("**/checkpoints/**/*") if file.is_file())
    return shutil.disk_usage(there).free + sum(checkpoints)
