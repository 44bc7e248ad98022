"""The plan as text of about 110 columns."""

from collections.abc import Sequence
from dataclasses import replace

from qilin_med.config.experiment import EXAMPLES
from qilin_med.plan.advice import describe_change
from qilin_med.plan.compute import model_flops, training_flops
from qilin_med.plan.duration import (
    PUBLISHED_MFU,
    Duration,
    Rates,
    at_mfu,
    estimate,
    stage_duration,
    utilisation,
)
from qilin_med.plan.memory import moments, plan_memory
from qilin_med.plan.plan import StagePlan, alternatives, fits, largest_batch
from qilin_med.plan.storage import checkpoint_bytes, host_bytes, merged_bytes, offloaded_bytes

GIB = 2**30


def format_plan(plan: StagePlan, device: str, rates: Rates) -> str:
    """All there is to say on one stage. `device`: what a rank runs on, for the heading."""
    lines = [
        *_heading(plan, device),
        "",
        *_memory_table(plan),
        *_advice(plan),
        "",
        *_comparison(plan),
        "",
        *_run_lines(plan, rates),
        *_storage_lines(plan),
    ]
    return "\n".join(lines)


def _heading(plan: StagePlan, device: str) -> list[str]:
    t, section = plan.training, plan.section
    adapter = f", LoRA rank {t.lora.rank}{' on NF4' if t.lora.quantization else ''}" if t.lora else ", all parameters"
    recomputed = "recomputed activations" if t.checkpointing else "activations kept"
    return [
        f"{plan.stage}: {t.parameters:,} parameters, {t.trainable:,} trainable"
        f" ({t.trainable / t.parameters:.2%}){adapter}",
        f"{plan.machines.ranks} x {device}, {t.engine.name}, {t.dtype}, {recomputed};"
        f" {section.batch_size_per_device} {EXAMPLES[plan.stage]} of {t.sequences * t.length} tokens at once,"
        f" {plan.global_batch_size} an update",
    ]


def _memory_table(plan: StagePlan) -> list[str]:
    """Fullest moment before the optimizer's step, and the step."""
    *before, step = moments(plan.training)
    fullest = max(before, key=lambda memory: memory.total)
    rows = [["GiB a rank", *step.parts(), "total", "of"]]
    for memory in (fullest, step):
        values = [*memory.parts().values(), memory.total, plan.machines.memory]
        rows.append([memory.moment, *map(_gib, values)])
    largest = largest_batch(plan.training, plan.machines, plan.rows_of_a_rank)
    whole = ", a rank's part of an update" if largest == plan.rows_of_a_rank else ""
    return [*format_table(rows), f"{plan.verdict}; largest batch that fits: {largest}{whole}"]


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
            cells += [
                f"{_gib(memory.total)}{mark}",
                word,
                str(largest_batch(option, plan.machines, plan.rows_of_a_rank)),
            ]
        rows.append([*cells, _gib(host_bytes(training))])
    note = "GiB a rank with activations kept or recomputed, largest batch, host GiB a machine; < is this run"
    return [*format_table(rows), note]


def _run_lines(plan: StagePlan, rates: Rates) -> list[str]:
    work, amount = plan.work(), plan.amount
    if work is None:
        flops = training_flops(plan.training, plan.update_work)
        return [
            "data not built: figures of one update of full rows (--rows and --tokens set the amount)",
            f"an update: {plan.update_work.tokens:,.0f} tokens, {flops:.3g} FLOP{_update_time(plan, rates)}",
        ]
    return [
        f"data: {amount.rows:,} {EXAMPLES[plan.stage]}, {amount.tokens:,.0f} tokens ({amount.source})",
        f"{plan.updates:,} updates, {work.tokens:,.0f} tokens, {plan.flops():.3g} FLOP",
        *_time_lines(plan, rates),
    ]


def _update_time(plan: StagePlan, rates: Rates) -> str:
    if plan.machines.peak is None:
        return ""
    if rates.mfu:
        seconds = at_mfu(plan, model_flops(plan.training, plan.update_work), rates.mfu)
        return f", {seconds:,.2f} s at an MFU of {rates.mfu:.1%}, as stated"
    time = estimate(plan, rates, plan.update_work, 1)
    return f", {time.total:,.2f} s ({time.waiting:,.2f} of it waiting for other ranks)"


def _time_lines(plan: StagePlan, rates: Rates) -> list[str]:
    """Our own estimate, and beside it the best published rate."""
    time = stage_duration(plan, rates)
    if time is None:
        return []
    mfu, hfu = utilisation(plan, time.total)
    published = at_mfu(plan, plan.flops(model_flops), PUBLISHED_MFU)
    return [
        f"time: {_hours(time.total)}, MFU {mfu:.1%}, HFU {hfu:.1%}{', as stated' if rates.mfu else ''};"
        f" {_hours(published)} at the best published MFU, {PUBLISHED_MFU:.1%}",
        *([] if rates.mfu else [_parts(time, rates)]),
    ]


def _parts(time: Duration, rates: Rates) -> str:
    compute, waiting, writing = (part / time.total for part in (time.compute, time.waiting, time.writing))
    return (
        f"      {compute:.1%} computing at {rates.efficiency:.0%} of the peak, {waiting:.1%} waiting for other ranks,"
        f" {writing:.1%} writing {time.checkpoints:,} checkpoints"
    )


def _hours(seconds: float) -> str:
    days = f" ({seconds / 86400:,.2f} days)" if seconds > 86400 else ""
    return f"{seconds / 3600:,.1f} hours{days}" if seconds > 3600 else f"{seconds / 60:,.1f} minutes"


def _storage_lines(plan: StagePlan) -> list[str]:
    t, keep = plan.training, plan.section.keep_checkpoints
    whole = f"{_gib(plan.disk)} GiB: {keep} + 1 checkpoints of {_gib(checkpoint_bytes(t))}"
    host = f"host memory a machine: {_gib(plan.host)} GiB"
    if t.engine.offload_optimizer:
        host += f", {_gib(offloaded_bytes(t))} of it offloaded"
    return [f"disk: {whole}, merged model{' and adapter' if t.lora else ''} {_gib(merged_bytes(t))}", host]


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}" if value < 99.995 * GIB else f"{value / GIB:,.0f}"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first on the left, the others on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip


def format_total(plans: list[StagePlan], rates: Rates) -> str | None:
    """Time of all stages together; None where a stage's data or rate are unknown."""
    times = [stage_duration(plan, rates) for plan in plans]
    if None in times:
        return None
    published = sum(at_mfu(plan, plan.flops(model_flops), PUBLISHED_MFU) for plan in plans)
    return f"all stages: {_hours(sum(time.total for time in times))}; {_hours(published)} at the best published MFU"
