"""The plan as text of 100 columns."""

from collections.abc import Sequence
from dataclasses import replace

from qilin_med.planner.advice import describe_change
from qilin_med.planner.compute import training_flops
from qilin_med.planner.memory import moments, plan_memory
from qilin_med.planner.plan import StagePlan, alternatives, fits, largest_batch
from qilin_med.planner.storage import checkpoint_bytes, host_bytes, merged_bytes, offloaded_bytes

GIB = 2**30


def format_plan(plan: StagePlan, device: str, utilisation: float) -> str:
    """All there is to say on one stage. `device`: what a rank runs on, for the heading."""
    lines = [
        *_heading(plan, device),
        "",
        *_memory_table(plan),
        *_advice(plan),
        "",
        *_comparison(plan),
        "",
        *_run_lines(plan, utilisation),
        *_storage_lines(plan),
    ]
    return "\n".join(lines)


def _heading(plan: StagePlan, device: str) -> list[str]:
    t, section = plan.training, plan.section
    adapter = f", LoRA rank {t.lora.rank}{' on NF4' if t.lora.quantization else ''}" if t.lora else ", all parameters"
    recomputed = "recomputed activations" if t.checkpointing else "activations kept"
    pairs = "pairs" if t.sequences == 2 else "rows"
    return [
        f"{plan.stage}: {t.parameters:,} parameters, {t.trainable:,} trainable"
        f" ({t.trainable / t.parameters:.2%}){adapter}",
        f"{plan.machines.ranks} x {device}, {t.engine.name}, {t.dtype}, {recomputed};"
        f" {section.batch_size_per_device} {pairs} of {t.sequences * t.length} tokens at once,"
        f" {plan.rows_per_update} an update",
    ]


def _memory_table(plan: StagePlan) -> list[str]:
    """Fullest moment before the optimizer's step, and the step."""
    *before, step = moments(plan.training)
    fullest = max(before, key=lambda memory: memory.total)
    rows = [["GiB a rank", *step.parts(), "total", "of"]]
    for memory in (fullest, step):
        values = [*memory.parts().values(), memory.total, plan.machines.memory]
        rows.append([memory.moment, *map(_gib, values)])
    return [
        *format_table(rows),
        f"{plan.verdict}; largest batch that fits: {largest_batch(plan.training, plan.machines)}",
    ]


def _advice(plan: StagePlan) -> list[str]:
    return [] if plan.verdict == "fits" else [describe_change(plan)]


def _comparison(plan: StagePlan) -> list[str]:
    rows = [["engine", "kept", "", "batch", "recomputed", "", "batch", "host"]]
    own = plan.training
    engines = list(alternatives(own))
    if not own.engine.deepspeed:
        engines.insert(0, own)
    for training in engines:
        cells = [training.engine.name]
        for checkpointing in (False, True):
            option = replace(training, checkpointing=checkpointing)
            memory = plan_memory(option)
            mark = "<" if option == own else " "
            word = "fits" if fits(memory, plan.machines) else "no"
            cells += [f"{_gib(memory.total)}{mark}", word, str(largest_batch(option, plan.machines))]
        rows.append([*cells, _gib(host_bytes(training))])
    note = "GiB a rank with activations kept or recomputed, largest batch, host GiB a machine; < is this run"
    return [*format_table(rows), note]


def _run_lines(plan: StagePlan, utilisation: float) -> list[str]:
    work, amount = plan.work(), plan.amount
    if work is None:
        flops = training_flops(plan.training, plan.update_work)
        lines = [
            "data not built: figures of one update of full rows (--rows and --tokens set the amount)",
            f"an update: {plan.update_work.tokens:,.0f} tokens, {_flops(flops)}{_duration(plan, flops, utilisation)}",
        ]
    else:
        flops = plan.flops()
        lines = [
            f"data: {amount.rows:,} rows, {amount.tokens:,.0f} tokens ({amount.source})",
            f"{plan.updates:,} updates, {work.tokens:,.0f} tokens, {_flops(flops)}"
            f"{_duration(plan, flops, utilisation)}",
        ]
    return lines


def _storage_lines(plan: StagePlan) -> list[str]:
    t, keep = plan.training, plan.section.keep_checkpoints
    whole = f"{_gib(plan.disk)} GiB: {keep} + 1 checkpoints of {_gib(checkpoint_bytes(t))}"
    host = f"host memory a machine: {_gib(plan.host)} GiB"
    if t.engine.offload_optimizer:
        host += f", {_gib(offloaded_bytes(t))} of it offloaded"
    return [f"disk: {whole}, merged model{' and adapter' if t.lora else ''} {_gib(merged_bytes(t))}", host]


def _duration(plan: StagePlan, flops: float, utilisation: float) -> str:
    if plan.machines.peak is None:
        return ""
    seconds = plan.seconds(flops, utilisation)
    length = f"{seconds / 86400:,.2f} days" if seconds > 36000 else f"{seconds / 3600:,.2f} hours"
    return f", {length if seconds > 360 else f'{seconds:,.2f} s'} at {utilisation:.0%} of the peak"


def _flops(value: float) -> str:
    return f"{value:.3g} FLOP"


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}" if value < 99.995 * GIB else f"{value / GIB:,.0f}"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first on the left, the others on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip


def format_total(plans: list[StagePlan], utilisation: float) -> str | None:
    """Days of all stages together; None where a stage's data or rate are unknown."""
    flops = [plan.flops() for plan in plans]
    if None in flops or any(plan.machines.peak is None for plan in plans):
        return None
    seconds = sum(plan.seconds(value, utilisation) for plan, value in zip(plans, flops, strict=True))
    return f"all stages: {seconds / 86400:,.2f} days at {utilisation:.0%} of the peak"
