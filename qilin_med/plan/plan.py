"""One stage of an experiment on given machines: what it needs, and whether it fits."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from qilin_med.config.experiment import (
    DpoConfig,
    Experiment,
    InstructionConfig,
    PretrainingConfig,
    StageConfig,
    StageName,
    read_deepspeed,
)
from qilin_med.config.schedule import check_batch_size
from qilin_med.plan.architecture import Architecture
from qilin_med.plan.compute import Work, reference_flops, training_flops
from qilin_med.plan.data import Amount, row_shape
from qilin_med.plan.engine import read_engine
from qilin_med.plan.memory import Memory, Training, plan_memory
from qilin_med.plan.storage import disk_bytes, host_bytes

MARGIN = 0.10  # by how much the estimate of memory may be off (tests/test_planner.py holds it to that)


@dataclass(frozen=True)
class Machines:
    nodes: int
    ranks_per_node: int
    memory: float
    """Bytes that one rank may use: its GPU's, or its part of a CPU machine's."""
    peak: float | None
    """FLOP/s of one rank at its best; None where unknown (CPUs)."""
    bandwidth: float | None = None
    """Bytes/s that a ring of all ranks passes through each of them; None where unknown."""

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
    def global_batch_size(self) -> int:
        return self.section.global_batch_size or self.section.batch_size_per_device * self.machines.ranks

    @property
    def rows_of_a_rank(self) -> int:
        """A rank's part of an update, more than which it never takes at once."""
        return self.global_batch_size // self.machines.ranks

    @property
    def accumulation(self) -> int:
        return self.global_batch_size // (self.section.batch_size_per_device * self.machines.ranks)

    @property
    def updates(self) -> int | None:
        if self.section.max_steps:
            return self.section.max_steps
        return self.amount and math.ceil(self.section.epochs * math.ceil(self.amount.rows / self.global_batch_size))

    def work(self) -> Work | None:
        """What the whole stage computes; None where the data are unknown."""
        if not self.amount:
            return None
        passes = self.updates / math.ceil(self.amount.rows / self.global_batch_size)
        return Work(self._tokens_of_a_pass * passes, self.amount.trained * passes)

    @property
    def _tokens_of_a_pass(self) -> float:
        """A pair's question is read with either answer; without packing every sequence is as long as the longest."""
        if isinstance(self.section, InstructionConfig) and not self.section.packing:
            return self.amount.rows * self.training.sequences * self.training.length
        return 2 * self.amount.tokens - self.amount.trained if self.stage == "dpo" else self.amount.tokens

    @property
    def update_work(self) -> Work:
        """One update of rows that are as long as they may be."""
        tokens = self.global_batch_size * self.training.sequences * self.training.length
        return Work(tokens, tokens * self.training.targets)

    def flops(self, count: Callable[[Training, Work], float] = training_flops) -> float:
        """Of the whole stage over all ranks, its data being known."""
        return count(self.training, self.work()) + self.reference_flops

    @property
    def reference_flops(self) -> float:
        """Of the reference's pass over all pairs, before DPO."""
        if self.stage != "dpo":
            return 0
        return reference_flops(self.training, Work(self._tokens_of_a_pass, self.amount.trained))

    @property
    def disk(self) -> float:
        return disk_bytes(self.training, self.section.keep_checkpoints)

    @property
    def host(self) -> float:
        return host_bytes(self.training)

    @property
    def verdict(self) -> str:
        return verdict(self.memory, self.machines)


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
    section = experiment.stage(stage)
    check_batch_size(stage, section, machines.ranks)
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
    if amount and amount.longest and not isinstance(section, PretrainingConfig):
        # Blocks are full, however short their documents are.
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


def largest_batch(training: Training, machines: Machines, most: int) -> int:
    """Rows at once that fit, at most `most`; 0 if not even one does."""

    def fit(rows: int) -> bool:
        return fits(plan_memory(replace(training, rows=rows)), machines)

    return bisect_left(range(1, most + 1), True, key=lambda rows: not fit(rows))


ENGINES = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))


def alternatives(training: Training) -> Iterator[Training]:
    """The same stage under every stage of ZeRO, with and without offloading to the host; recomputation as it is."""
    for zero, offload in ENGINES:
        if zero == 3 and training.lora and training.lora.quantization:
            continue  # ZeRO-3 cannot split 4-bit weights
        engine = training.engine.like(zero, offload, training.architecture.hidden)
        is_own = training.engine.deepspeed and (engine.name == training.engine.name)
        yield training if is_own else replace(training, engine=engine)
