"""What else a stage could be run with, and the cheapest change of settings that makes it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from qilin_med.plan.plan import MARGIN, StagePlan

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


@dataclass(frozen=True)
class Change:
    """A plan, and the overrides of the experiment file that lead to it."""

    plan: StagePlan
    overrides: tuple[str, ...]
    cost: int


def alternatives(plan: StagePlan) -> Iterator[StagePlan]:
    """The same stage under every stage of ZeRO, with and without offloading to the host; recomputation as it is."""
    if plan.engine.zero is None:
        yield plan
    for zero, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        if zero == 3 and plan.quantized:
            continue  # ZeRO-3 cannot split 4-bit weights
        engine = plan.engine.like(zero, offload)
        yield plan if engine.name == plan.engine.name else replace(plan, engine=engine)


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
