"""The plan as text of about 110 columns."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qilin_med.config.experiment import EXAMPLES
from qilin_med.plan.duration import PUBLISHED_MFU, Rates, at_mfu, estimate, stage_duration, utilisation
from qilin_med.plan.machines import GIB
from qilin_med.plan.plan import StagePlan
from qilin_med.plan.preflight import describe_change


def format_plan(plan: StagePlan, device: str, rates: Rates) -> str:
    """All there is to say on one stage. `device`: what a rank runs on, for the heading."""
    advice = [] if plan.verdict == "fits" else [describe_change(plan)]
    parts = (_heading(plan, device), [*_memory_table(plan), *advice], _comparison(plan), _run_lines(plan, rates))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _heading(plan: StagePlan, device: str) -> list[str]:
    section, lora = plan.section, plan.section.lora
    adapter = f", LoRA rank {lora.rank}{' on NF4' if lora.quantization else ''}" if lora else ", all parameters"
    recomputed = "recomputed activations" if section.activation_checkpointing else "activations kept"
    return [
        f"{plan.stage}: {plan.parameters:,} parameters, {plan.trainable:,} trainable"
        f" ({plan.trainable / plan.parameters:.2%}){adapter}",
        f"{plan.machines.ranks} x {device}, {plan.engine.name}, {plan.model.dtype}, {recomputed}; {plan.rows}"
        f" {EXAMPLES[plan.stage]} of {plan.row_tokens} tokens at once, {plan.schedule.global_batch_size} an optimizer step",
    ]


def _memory_table(plan: StagePlan) -> list[str]:
    """Fullest moment before the optimizer's step, and the step."""
    *before, step = plan.moments
    fullest = max(before, key=lambda memory: memory.total)
    rows = [["GiB a rank", *step.parts(), "total", "of"]]
    for memory in (fullest, step):
        rows.append([memory.moment, *map(_gib, (*memory.parts().values(), memory.total, plan.machines.memory))])
    largest = plan.largest_batch(plan.rows_of_a_rank)
    whole = ", a rank's part of an optimizer step" if largest == plan.rows_of_a_rank else ""
    return [*format_table(rows), f"{plan.verdict}; largest batch that fits: {largest}{whole}"]


def _comparison(plan: StagePlan) -> list[str]:
    rows = [["engine", "kept", "", "batch", "recomputed", "", "batch", "host"]]
    for engine in alternatives(plan):
        cells = [engine.engine.name]
        for recomputed in (False, True):
            option = engine.changed(activation_checkpointing=recomputed)
            mark, word = "<" if option == plan else " ", "fits" if option.fits else "no"
            cells += [f"{_gib(option.memory.total)}{mark}", word, str(option.largest_batch(plan.rows_of_a_rank))]
        rows.append([*cells, _gib(engine.host)])
    note = "GiB a rank with activations kept or recomputed, largest batch, host GiB a machine; < is this run"
    return [*format_table(rows), note]


def alternatives(plan: StagePlan) -> Iterator[StagePlan]:
    """The same stage under every stage of ZeRO, with and without offloading to the host; recomputation as it is."""
    if plan.engine.zero is None:
        yield plan
    for zero, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        if zero == 3 and plan.quantized:
            continue  # ZeRO-3 cannot split 4-bit weights
        engine = plan.engine.like(zero, offload)
        yield plan if engine.name == plan.engine.name else replace(plan, engine=engine)


def _run_lines(plan: StagePlan, rates: Rates) -> list[str]:
    """Data, operations and time, where they are known; disk and host memory."""
    if plan.amount is None:
        step, time = plan.step_work, ""
        if plan.machines.peak and rates.mfu:
            time = f", {at_mfu(plan, rates.mfu, step):,.2f} s at an MFU of {rates.mfu:.1%}, as stated"
        elif plan.machines.peak:
            seconds = estimate(plan, rates, step, 1)
            time = f", {seconds.total:,.2f} s ({seconds.waiting:,.2f} of it waiting for other ranks)"
        lines = [
            "data not built: figures of one optimizer step of full rows (--rows and --tokens set the amount)",
            f"an optimizer step: {step.tokens:,.0f} tokens, {plan.training_flops(step):.3g} FLOP{time}",
        ]
    else:
        amount, work = plan.amount, plan.work()
        flops = plan.training_flops(work) + plan.reference_flops
        lines = [
            f"data: {amount.rows:,} {EXAMPLES[plan.stage]}, {amount.tokens:,.0f} tokens ({amount.source})",
            f"{plan.schedule.steps:,} optimizer steps, {work.tokens:,.0f} tokens, {flops:.3g} FLOP",
            *_time_lines(plan, rates),
        ]
    adapter, merged = " and adapter" if plan.section.lora else "", _gib(plan.merged_bytes)
    checkpoints = f"{plan.section.keep_checkpoints} + 1 checkpoints of {_gib(plan.checkpoint_bytes)}"
    offloaded = f", {_gib(plan.offloaded)} of it offloaded" if plan.engine.offload_optimizer else ""
    return [
        *lines,
        f"disk: {_gib(plan.disk)} GiB: {checkpoints}, merged model{adapter} {merged}",
        f"host memory a machine: {_gib(plan.host)} GiB{offloaded}",
    ]


def _time_lines(plan: StagePlan, rates: Rates) -> list[str]:
    """Our own estimate, and beside it the best published rate."""
    time = stage_duration(plan, rates)
    if time is None:
        return []
    mfu, hfu = utilisation(plan, time.total)
    shares = [part / time.total for part in (time.compute, time.waiting, time.writing)]
    parts = (
        f"      {shares[0]:.1%} computing at {rates.efficiency:.0%} of the peak, {shares[1]:.1%} waiting for other ranks,"
        f" {shares[2]:.1%} writing {time.checkpoints:,} checkpoints"
    )
    return [
        f"time: {_hours(time.total)}, MFU {mfu:.1%}, HFU {hfu:.1%}{', as stated' if rates.mfu else ''};"
        f" {_hours(at_mfu(plan, PUBLISHED_MFU))} at the best published MFU, {PUBLISHED_MFU:.1%}",
        *([] if rates.mfu else [parts]),
    ]


def format_total(plans: list[StagePlan], rates: Rates) -> str | None:
    """Time of all stages together; None where a stage's data or rate are unknown."""
    times = [stage_duration(plan, rates) for plan in plans]
    if None in times:
        return None
    published = sum(at_mfu(plan, PUBLISHED_MFU) for plan in plans)
    return f"all stages: {_hours(sum(time.total for time in times))}; {_hours(published)} at the best published MFU"


def _hours(seconds: float) -> str:
    days = f" ({seconds / 86400:,.2f} days)" if seconds > 86400 else ""
    return f"{seconds / 3600:,.1f} hours{days}" if seconds > 3600 else f"{seconds / 60:,.1f} minutes"


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}" if value < 99.995 * GIB else f"{value / GIB:,.0f}"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first on the left, the others on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]  # fmt: skip
