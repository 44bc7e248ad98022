"""The schedule of a stage: how many optimizer steps of how many rows. The only place that computes it."""

import math
from dataclasses import dataclass

from qilin_med.config.experiment import StageConfig
from qilin_med.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """`rows` are blocks, conversations or pairs (`config.experiment.EXAMPLES`)."""

    rows: int
    """Of one epoch."""
    ranks: int
    batch_size: int
    """Rows that one rank takes at once."""
    accumulation: int
    """Micro-batches of each rank in an optimizer step."""
    steps: int
    """Optimizer steps of the whole stage."""
    warmup_steps: int

    @property
    def global_batch_size(self) -> int:
        return self.ranks * self.batch_size * self.accumulation

    @property
    def epochs(self) -> float:
        return self.steps / math.ceil(self.rows / self.global_batch_size)


def make_schedule(stage: str, section: StageConfig, rows: int, ranks: int) -> Schedule:
    """UserError unless an optimizer step's rows divide evenly among ranks and batches."""
    check_batch_size(stage, section, ranks)
    batch_size, together = section.batch_size_per_device, ranks * section.batch_size_per_device
    global_batch_size = section.global_batch_size or together
    steps = section.max_steps or math.ceil(section.epochs * math.ceil(rows / global_batch_size))
    warmup = math.ceil(section.warmup_ratio * steps)
    return Schedule(rows, ranks, batch_size, global_batch_size // together, steps, warmup)


def check_batch_size(stage: str, section: StageConfig, ranks: int) -> None:
    """UserError unless the global batch divides evenly among ranks and batches."""
    together = ranks * section.batch_size_per_device
    if section.global_batch_size and section.global_batch_size % together:
        raise UserError(
            f"{stage}.global_batch_size is {section.global_batch_size}, which does not divide by {ranks} ranks x"
            f" {stage}.batch_size_per_device {section.batch_size_per_device} = {together}; make it a multiple of {together}"
        )


def check_rows(stage: str, schedule: Schedule) -> None:
    """UserError unless there are rows for one batch on each rank."""
    together = schedule.ranks * schedule.batch_size
    if schedule.rows < together:
        raise UserError(
            f"{stage}: {schedule.rows} rows are too few for one batch on each rank ({schedule.ranks} x"
            f" {schedule.batch_size} = {together}); lower batch_size_per_device or add data"
        )
