"""How long a stage takes: what its ranks compute, what they wait for from each other, what they write.

Two ratios tell how well a machine is used. Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) sets what the
model itself has to compute against the peak over the whole time; hardware FLOPs utilisation (Korthikanti et al.,
arXiv:2205.05198, section 6.3) sets what is really computed against it, recomputation included.
"""

import math
from dataclasses import dataclass

from qilin_med.plan.compute import Work, forward_flops, model_flops, training_flops
from qilin_med.plan.memory import Training, gradient_bytes, weights_bytes
from qilin_med.plan.plan import StagePlan
from qilin_med.plan.storage import checkpoint_bytes

# The best published training of a 7B model on A100s: 4,357 tokens/s a card at 1,024 tokens, 8 A100-80G, 1,024 rows an
# update (github.com/mosaicml/llm-foundry, scripts/train/benchmarking). Its MFU is taken with the FLOPs of Baichuan-7B,
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


@dataclass(frozen=True)
class Exchange:
    """Seconds of an update in which data travel between ranks."""

    forward: float = 0
    backward: float = 0
    """During the passes, in the background."""
    after: float = 0
    """When nothing is computed."""


def ring_seconds(size: float, ranks: int, bandwidth: float, passes: int) -> float:
    """Of a collective over a ring: `passes` 1 for an all-gather or reduce-scatter of `size` bytes, 2 for an all-reduce."""
    return passes * (ranks - 1) / ranks * size / bandwidth


def exchange(training: Training, accumulation: int, bandwidth: float) -> Exchange:
    """What an update sends, as DeepSpeed 0.19.8 does it.

    ZeRO-2 all-reduces gradients after every backward pass, ZeRO-3 reduce-scatters them; ZeRO-1 and plain PyTorch wait
    for the update's last pass. `overlap_comm` (and DDP) does it while the pass goes on. ZeRO-1 and 2 gather the new
    weights after the step, ZeRO-3 all weights in each pass.
    """
    t, engine = training, training.engine

    def seconds(size: float, passes: int) -> float:
        return ring_seconds(size, t.ranks, bandwidth, passes)

    reduced = seconds(t.trainable * gradient_bytes(t), 1 if engine.zero == 3 else 2)
    reduced *= accumulation if engine.zero >= 2 else 1
    if engine.zero == 3:
        gathered = accumulation * seconds(weights_bytes(t), 1)
        return Exchange(forward=gathered, backward=gathered + reduced)
    gathered = seconds(t.trainable * t.trained_bytes, 1) if engine.zero else 0
    if engine.buckets == 2 or not engine.deepspeed:
        return Exchange(backward=reduced, after=gathered)
    return Exchange(after=reduced + gathered)


def estimate(plan: StagePlan, rates: Rates, work: Work, updates: int) -> Duration:
    """Time of `work`, done in so many updates, without checkpoints.

    Communication in the background costs only what exceeds the pass that hides it. Not counted: the optimizer's step,
    what offloading moves, latency.
    """
    t, machines = plan.training, plan.machines
    rate = machines.ranks * machines.peak * rates.efficiency
    compute, forward = training_flops(t, work) / rate, forward_flops(t, work) / rate
    if machines.bandwidth is None:
        return Duration(compute, 0)
    sent = exchange(t, plan.accumulation, machines.bandwidth)
    # Where gradients travel with the last of several batches alone, only that batch's backward pass hides them.
    hiding = (compute - forward) / (1 if t.engine.zero >= 2 else plan.accumulation)
    waiting = max(0.0, updates * sent.forward - forward) + max(0.0, updates * sent.backward - hiding)
    return Duration(compute, waiting + updates * sent.after)


def stage_duration(plan: StagePlan, rates: Rates) -> Duration | None:
    """Of the whole stage; None where its data or the machine's peak are unknown."""
    work = plan.work()
    if work is None or plan.machines.peak is None:
        return None
    if rates.mfu:
        return Duration(at_mfu(plan, plan.flops(model_flops), rates.mfu), 0)
    train = estimate(plan, rates, work, plan.updates)
    reference = plan.reference_flops / (plan.machines.ranks * plan.machines.peak * rates.efficiency)
    minutes, every = plan.section.checkpoint_minutes, plan.section.checkpoint_every
    number = count_checkpoints(minutes, every, plan.updates, train.total)
    writing = number * checkpoint_bytes(plan.training) / rates.disk
    return Duration(train.compute + reference, train.waiting, writing, number)


def count_checkpoints(minutes: float | None, every: int | None, updates: int, seconds: float) -> int:
    """One is due when either interval is over, minutes or updates, and one ends the stage."""
    intervals = [60 * minutes] if minutes else []
    intervals += [every * seconds / updates] if every else []
    return 1 + math.floor(seconds / min(intervals)) if intervals else 1


def at_mfu(plan: StagePlan, flops: float, mfu: float) -> float:
    """Seconds that so many model FLOPs take at this utilisation."""
    return flops / (plan.machines.ranks * plan.machines.peak * mfu)


def utilisation(plan: StagePlan, seconds: float) -> tuple[float, float]:
    """MFU and HFU of the whole stage when it takes `seconds`."""
    whole = plan.machines.ranks * plan.machines.peak * seconds
    return plan.flops(model_flops) / whole, plan.flops() / whole
