"""One stage of an experiment on given machines: what it needs, and whether it fits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from qilin_med.config import DpoConfig, Experiment, StageConfig, StageName
from qilin_med.job import check_batch, read_deepspeed
from qilin_med.planner.architecture import Architecture
from qilin_med.planner.compute import Work, reference_flops, training_flops
from qilin_med.planner.data import Amount, row_shape
from qilin_med.planner.engine import read_engine
from qilin_med.planner.memory import Memory, Training, plan_memory
from qilin_med.planner.storage import disk_bytes, host_bytes

MARGIN = 0.10  # by how much the estimate of memory may be off (tests/test_planner.py holds it to that)


@dataclass(frozen=True)
class Machines:
    nodes: int
    ranks_per_node: int
    memory: float
    """Bytes that one rank may use: its GPU's, or its part of a CPU machine's."""
    peak: float | None
    """FLOP/s of one rank at its best; None where unknown (CPUs)."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class StagePlan:
    stage: StageName
    section: StageConfig
    training: Training
    machines: Machines
    amount: Amount | None

    @cached_property
    def memory(self) -> Memory:
        return plan_memory(self.training)

    @property
    def rows_per_update(self) -> int:
        return self.section.global_batch_size or self.section.batch_size_per_device * self.machines.ranks

    @property
    def accumulation(self) -> int:
        return self.rows_per_update // (self.section.batch_size_per_device * self.machines.ranks)

    @property
    def updates(self) -> int | None:
        if self.section.max_steps:
            return self.section.max_steps
        return self.amount and math.ceil(self.section.epochs * math.ceil(self.amount.rows / self.rows_per_update))

    def work(self) -> Work | None:
        """What the whole stage computes; None where the data are unknown."""
        if not self.amount:
            return None
        passes = self.updates / math.ceil(self.amount.rows / self.rows_per_update)
        return Work(_computed_tokens(self.stage, self.amount) * passes, self.amount.trained * passes)

    @property
    def update_work(self) -> Work:
        """One update of rows that are as long as they may be."""
        tokens = self.rows_per_update * self.training.sequences * self.training.length
        return Work(tokens, tokens * self.training.targets)

    def flops(self) -> float | None:
        """Of the whole stage over all ranks, a DPO reference pass included."""
        work = self.work()
        if work is None:
            return None
        if self.stage != "dpo":
            return training_flops(self.training, work)
        reference = Work(_computed_tokens(self.stage, self.amount), self.amount.trained)
        return training_flops(self.training, work) + reference_flops(self.training, reference)

    def seconds(self, flops: float, utilisation: float) -> float:
        """How long so many operations take when so great a share of all ranks' peak is reached."""
        return flops / (self.machines.ranks * self.machines.peak * utilisation)

    @property
    def disk(self) -> float:
        return disk_bytes(self.training, self.section.keep_checkpoints)

    @property
    def host(self) -> float:
        return host_bytes(self.training)

    @property
    def verdict(self) -> str:
        return verdict(self.memory, self.machines)


def _computed_tokens(stage: StageName, amount: Amount) -> float:
    """A pair's question is read with either answer."""
    return 2 * amount.tokens - amount.trained if stage == "dpo" else amount.tokens


def verdict(memory: Memory, machines: Machines) -> str:
    if fits(memory, machines):
        return "fits"
    return "does not fit" if memory.total * (1 - MARGIN) > machines.memory else "may not fit"


def fits(memory: Memory, machines: Machines) -> bool:
    return memory.total * (1 + MARGIN) <= machines.memory


def plan_stage(
    experiment: Experiment,
    stage: StageName,
    architecture: Architecture,
    machines: Machines,
    amount: Amount | None = None,
) -> StagePlan:
    """UserError: batch sizes that do not divide, an unreadable DeepSpeed file, adapters on layers that are not there."""
    check_batch(experiment, stage, machines.ranks)
    section = experiment.stage(stage)
    training = _training(experiment, section, architecture, machines, amount)
    return StagePlan(stage, section, training, machines, amount)


def _training(
    experiment: Experiment,
    section: StageConfig,
    architecture: Architecture,
    machines: Machines,
    amount: Amount | None,
) -> Training:
    rows = section.batch_size_per_device
    lora = section.lora
    if lora:
        architecture.adapted(lora)
    longest, targets = row_shape(section)
    if amount and amount.longest:
        longest = min(longest, amount.longest)
    return Training(
        architecture=architecture,
        engine=read_engine(read_deepspeed(section.deepspeed), architecture.hidden),
        lora=lora,
        dtype=experiment.model.dtype,
        on_gpu=experiment.launch.device == "cuda",
        attention=experiment.model.attention,
        fused=experiment.model.fused_kernels,
        checkpointing=section.activation_checkpointing,
        ranks=machines.ranks,
        local_ranks=machines.ranks_per_node,
        rows=rows,
        sequences=2 if isinstance(section, DpoConfig) else 1,
        length=longest,
        targets=targets,
        accumulates=bool(section.global_batch_size) and section.global_batch_size > rows * machines.ranks,
    )


def largest_batch(training: Training, machines: Machines) -> int:
    """Rows at once that fit, 0 if not even one does."""

    def fit(rows: int) -> bool:
        return fits(plan_memory(replace(training, rows=rows)), machines)

    if not fit(1):
        return 0
    high = 2
    while fit(high) and high < 2**16:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


ENGINES = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))


def alternatives(training: Training) -> Iterator[Training]:
    """The same stage under every stage of ZeRO, with and without offloading to the host; recomputation as it is."""
    for zero, offload in ENGINES:
        if zero == 3 and training.lora and training.lora.quantization:
            continue  # ZeRO-3 cannot split 4-bit weights
        engine = training.engine.like(zero, offload, training.architecture.hidden)
        is_own = training.engine.deepspeed and (engine.name == training.engine.name)
        yield training if is_own else replace(training, engine=engine)
