"""Refuse a run that cannot fit this machine before its model is loaded, with the cheapest change that makes it fit."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from qilin_med.config.experiment import Experiment, StageName
from qilin_med.errors import UserError
from qilin_med.plan.data import Amount
from qilin_med.plan.machines import GIB, Machines, local_machine
from qilin_med.plan.measure import Unmeasured
from qilin_med.plan.plan import MARGIN, StagePlan, plan_stage

# What changes cost, in the order in which a researcher would accept them: a smaller batch keeps the numbers and nearly
# the speed; recomputation takes a third more time; ZeRO-3 half as much communication again; offloading waits for the
# host; NF4 gives another model.
_BATCH, _RECOMPUTE, _NF4 = 1, 2, 24
_ENGINES = {  # (stage of ZeRO, offloading): what it costs to change to our file of it
    (2, False): ("configs/deepspeed/zero2.json", 3),
    (3, False): ("configs/deepspeed/zero3.json", 6),
    (2, True): ("configs/deepspeed/zero2_offload.json", 12),
    (3, True): ("configs/deepspeed/zero3_offload.json", 12 + 6),
}


class Change(NamedTuple):
    """A plan, and the overrides of the experiment file that lead to it."""

    plan: StagePlan
    overrides: tuple[str, ...]
    cost: int


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


# ------------------------------------------------------------------------------------------------------------- advice


def describe_change(plan: StagePlan) -> str:
    """The advice in words, for a stage that does not fit."""
    if change := cheapest_change(plan):
        return f"cheapest change: {change}"
    least = min(change.plan.changed(batch_size_per_device=1).memory.total for change in _changes(plan)) * (1 + MARGIN)
    return f"no setting makes it fit: the least is {least / 2**30:.1f} GiB a rank; more or larger GPUs are needed"


def cheapest_change(plan: StagePlan) -> str | None:
    """Overrides to add to the command; None if no setting makes the stage fit."""
    changes = sorted(_changes(plan), key=lambda change: change.cost)
    fitting = [found for change in changes if (found := _with_batch(change))]
    return " ".join(min(fitting, key=lambda change: change.cost).overrides) if fitting else None


def _changes(plan: StagePlan) -> Iterator[Change]:
    """Every combination of recomputation, engine and 4-bit weights, the batch left as it is."""
    lora, stage = plan.section.lora, plan.stage
    engines = [(plan.engine, "", 0)]
    for (zero, offload), (file, cost) in _ENGINES.items():
        if (zero, offload) != (plan.engine.zero, plan.engine.offload_optimizer):
            engines.append((plan.engine.like(zero, offload), f"{stage}.deepspeed={file}", cost))
    recompute = (False,) if plan.section.activation_checkpointing else (False, True)
    quantize = (False, True) if lora and not lora.quantization and plan.on_gpu else (False,)
    for again, (engine, override, cost), nf4 in product(recompute, engines, quantize):
        if engine.zero == 3 and (nf4 or plan.quantized):
            continue
        changed = replace(plan, engine=engine)
        changed = changed.changed(activation_checkpointing=True) if again else changed
        changed = changed.changed(lora=lora.model_copy(update={"quantization": "nf4"})) if nf4 else changed
        overrides = (f"{stage}.activation_checkpointing=true" * again, override, f"{stage}.lora.quantization=nf4" * nf4)
        yield Change(changed, tuple(filter(None, overrides)), _RECOMPUTE * again + cost + _NF4 * nf4)


def _with_batch(change: Change) -> Change | None:
    """The change with the largest batch that fits and divides the optimizer step evenly; None if there is none."""
    plan = change.plan
    if plan.fits:
        return change
    most = min(plan.largest_batch(plan.rows_of_a_rank), plan.rows - 1)
    rows = next((rows for rows in range(most, 0, -1) if plan.rows_of_a_rank % rows == 0), None)
    if rows is None:
        return None
    smaller = plan.changed(batch_size_per_device=rows, global_batch_size=plan.schedule.global_batch_size)
    overrides = (
        f"{plan.stage}.batch_size_per_device={rows}",
        f"{plan.stage}.global_batch_size={plan.schedule.global_batch_size}",
    )
    return Change(smaller, change.overrides + overrides, change.cost + _BATCH) if smaller.fits else None
