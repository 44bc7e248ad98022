"""How long a stage takes: what its ranks compute, what they wait for from each other, what they write.

Two ratios tell how well a machine is used. Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) sets what the
model itself has to compute against the peak over the whole time; hardware FLOPs utilisation (Korthikanti et al.,
arXiv:2205.05198, section 6.3) sets what is really computed against it, recomputation included.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from qilin_med.plan.plan import StagePlan, Work

# The best published training of a 7B model on A100s: 4,357 tokens/s a card at 1,024 tokens, 8 A100-80G, 1,024 rows a
# step (github.com/mosaicml/llm-foundry, scripts/train/benchmarking). Its MFU is taken with the FLOPs of Baichuan-7B,
# 42.04 GFLOP a token, so that the rate holds for that model; the published model is 5% smaller (MFU 58.0%).
PUBLISHED_MFU = 4357 * 42.04e9 / 312e12


@dataclass(frozen=True)
class Rates:
    efficiency: float = 0.5
    """Share of the peak that kernels reach while they compute."""
    disk: float = 2e9
    """Bytes/s at which checkpoints are written."""
    mfu: float | None = None
    """A whole run's model FLOPs utilisation, known from elsewhere: replaces the estimate of its time."""


@dataclass(frozen=True)
class Duration:
    """Seconds."""

    compute: float
    waiting: float
    """For other ranks, where nothing is computed meanwhile."""
    writing: float = 0
    checkpoints: int = 0
    """How many are written."""

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.writing


class Exchange(NamedTuple):
    """Seconds of an optimizer step in which data travel between ranks."""

    forward: float = 0
    backward: float = 0
    """During the passes, in the background."""
    after: float = 0
    """When nothing is computed."""


def ring_seconds(size: float, ranks: int, bandwidth: float, passes: int) -> float:
    """Of a collective over a ring: `passes` 1 for an all-gather or reduce-scatter of `size` bytes, 2 for an all-reduce."""
    return passes * (ranks - 1) / ranks * size / bandwidth


def exchange(plan: StagePlan, bandwidth: float) -> Exchange:
    """What an optimizer step sends, as DeepSpeed 0.19.8 does it.

    ZeRO-2 all-reduces gradients after every backward pass, ZeRO-3 reduce-scatters them; ZeRO-1 and plain PyTorch wait
    for the step's last pass. `overlap_comm` (and DDP) does it while the pass goes on. ZeRO-1 and 2 gather the new
    weights after the step, ZeRO-3 all weights in each pass.
    """
    zero, ranks = plan.engine.zero or 0, plan.machines.ranks
    reduced = ring_seconds(plan.trainable * plan.gradient_bytes, ranks, bandwidth, 1 if zero == 3 else 2)
    reduced *= plan.accumulation if zero >= 2 else 1
    if zero == 3:
        gathered = plan.accumulation * ring_seconds(plan.weights_bytes, ranks, bandwidth, 1)
        return Exchange(forward=gathered, backward=gathered + reduced)
    gathered = ring_seconds(plan.trainable * plan.trained_bytes, ranks, bandwidth, 1) if zero else 0
    if plan.engine.overlaps or plan.engine.zero is None:
        return Exchange(backward=reduced, after=gathered)
    return Exchange(after=reduced + gathered)


def estimate(plan: StagePlan, rates: Rates, work: Work, steps: int) -> Duration:
    """Time of `work`, done in so many optimizer steps, without checkpoints.

    Communication in the background costs only what exceeds the pass that hides it. Not counted: the optimizer's own time,
    what offloading moves, latency.
    """
    machines = plan.machines
    rate = machines.ranks * machines.peak * rates.efficiency
    compute, forward = plan.training_flops(work) / rate, plan.forward_flops(work) / rate
    if machines.bandwidth is None:
        return Duration(compute, 0)
    sent = exchange(plan, machines.bandwidth)
    # Where gradients travel with the last of several batches alone, only that batch's backward pass hides them.
    hiding = (compute - forward) / (1 if (plan.engine.zero or 0) >= 2 else plan.accumulation)
    waiting = max(0.0, steps * sent.forward - forward) + max(0.0, steps * sent.backward - hiding)
    return Duration(compute, waiting + steps * sent.after)


def stage_duration(plan: StagePlan, rates: Rates) -> Duration | None:
    """Of the whole stage; None where its data or the machine's peak are unknown."""
    if plan.amount is None or plan.machines.peak is None:
        return None
    if rates.mfu:
        return Duration(at_mfu(plan, rates.mfu), 0)
    train = estimate(plan, rates, plan.work(), plan.schedule.steps)
    reference = plan.reference_flops / (plan.machines.ranks * plan.machines.peak * rates.efficiency)
    minutes, every = plan.section.checkpoint_minutes, plan.section.checkpoint_every
    number = count_checkpoints(minutes, every, plan.schedule.steps, train.total)
    writing = number * plan.checkpoint_bytes / rates.disk
    return Duration(train.compute + reference, train.waiting, writing, number)


def count_checkpoints(minutes: float | None, every: int | None, steps: int, seconds: float) -> int:
    """One is due when either interval is over, minutes or steps, and one ends the stage."""
    intervals = [60 * minutes] if minutes else []
    intervals += [every * seconds / steps] if every else []
    return 1 + math.floor(seconds / min(intervals)) if intervals else 1


def at_mfu(plan: StagePlan, mfu: float, work: Work | None = None) -> float:
    """Seconds that the model's own operations take at this utilisation: of `work`, else of the whole stage."""
    flops = plan.model_flops(work) if work else plan.model_flops(plan.work()) + plan.reference_flops
    return flops / (plan.machines.ranks * plan.machines.peak * mfu)


def utilisation(plan: StagePlan, seconds: float) -> tuple[float, float]:
    """MFU and HFU of the whole stage when it takes `seconds`."""
    possible = plan.machines.ranks * plan.machines.peak * seconds
    done = plan.training_flops(plan.work()) + plan.reference_flops
    return at_mfu(plan, 1.0) / seconds, done / possible
