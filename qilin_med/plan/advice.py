"""The cheapest change of settings that makes a stage fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qilin_med.plan.memory import Training, plan_memory
from qilin_med.plan.plan import MARGIN, StagePlan, fits, largest_batch

# What changes cost, in the order in which a researcher would accept them: a smaller batch keeps the numbers and nearly
# the speed; recomputation takes a third more time; ZeRO-3 half as much communication again; offloading waits for the
# host; NF4 gives another model.
_BATCH, _RECOMPUTE, _ZERO_2, _ZERO_3, _OFFLOAD, _NF4 = 1, 2, 3, 6, 12, 24
_FILES = {
    (2, False): ("configs/deepspeed/zero2.json", _ZERO_2),
    (3, False): ("configs/deepspeed/zero3.json", _ZERO_3),
    (2, True): ("configs/deepspeed/zero2_offload.json", _OFFLOAD),
    (3, True): ("configs/deepspeed/zero3_offload.json", _OFFLOAD + _ZERO_3),
}


@dataclass(frozen=True)
class Change:
    """Overrides of the experiment file, and the training that they make."""

    training: Training
    overrides: tuple[str, ...] = ()
    cost: int = 0

    def then(self, training: Training, override: str, cost: int) -> "Change":
        return Change(training, (*self.overrides, override), self.cost + cost)


def cheapest_change(plan: StagePlan) -> str | None:
    """Overrides to add to the command; None if no setting makes the stage fit."""
    changes = sorted(_changes(plan), key=lambda change: change.cost)
    fitting = (_with_batch(plan, change) for change in changes)
    found = sorted((c for c in fitting if c), key=lambda change: change.cost)
    return " ".join(found[0].overrides) if found else None


def describe_change(plan: StagePlan) -> str:
    """The advice in words, for a stage that does not fit."""
    change = cheapest_change(plan)
    if change:
        return f"cheapest change: {change}"
    smallest = min((c.training for c in _changes(plan)), key=lambda t: plan_memory(replace(t, rows=1)).total)
    needed = plan_memory(replace(smallest, rows=1)).total * (1 + MARGIN)
    return f"no setting makes it fit: the least is {needed / 2**30:.1f} GiB a rank; more or larger GPUs are needed"


def _changes(plan: StagePlan) -> Iterator[Change]:
    """Every combination of settings, the batch left as it is."""
    for recomputed in _recompute(plan, Change(plan.training)):
        for engine in _engines(plan, recomputed):
            yield from _adapters(plan, engine)


def _recompute(plan: StagePlan, change: Change) -> Iterator[Change]:
    yield change
    if not change.training.checkpointing:
        training = replace(change.training, checkpointing=True)
        yield change.then(training, f"{plan.stage}.activation_checkpointing=true", _RECOMPUTE)


def _engines(plan: StagePlan, change: Change) -> Iterator[Change]:
    yield change
    own, hidden = change.training.engine, change.training.architecture.hidden
    for (zero, offload), (file, cost) in _FILES.items():
        engine = own.like(zero, offload, hidden)
        if (zero, offload) != (own.zero, own.offload_optimizer):
            yield change.then(replace(change.training, engine=engine), f"{plan.stage}.deepspeed={file}", cost)


def _adapters(plan: StagePlan, change: Change) -> Iterator[Change]:
    yield change
    lora, engine = change.training.lora, change.training.engine
    if lora and not lora.quantization and not engine.shards_weights and change.training.on_gpu:
        quantised = lora.model_copy(update={"quantization": "nf4"})
        yield change.then(replace(change.training, lora=quantised), f"{plan.stage}.lora.quantization=nf4", _NF4)


def _with_batch(plan: StagePlan, change: Change) -> Change | None:
    """The change with the largest batch that fits and divides the update; None if there is none."""
    if fits(plan_memory(change.training), plan.machines):
        return change
    rows = _largest_divisor(plan, largest_batch(change.training, plan.machines, plan.rows_of_a_rank))
    if rows is None:
        return None
    overrides = f"{plan.stage}.batch_size_per_device={rows} {plan.stage}.global_batch_size={plan.global_batch_size}"
    smaller = replace(change.training, rows=rows, accumulates=True)
    return change.then(smaller, overrides, _BATCH) if fits(plan_memory(smaller), plan.machines) else None


def _largest_divisor(plan: StagePlan, most: int) -> int | None:
    """Rows at once that split a rank's part of an update evenly, at most `most` and fewer than now."""
    return next(
        (rows for rows in range(min(most, plan.training.rows - 1), 0, -1) if plan.rows_of_a_rank % rows == 0), None
    )
