"""Machines: graphics cards with their memory, peak arithmetic and links, and what this machine has free."""

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from qilin_med.config.experiment import Experiment
from qilin_med.errors import UserError

GIB = 2**30
# What a ring of 8 A100s reaches over NVSwitch, 230 GB/s, is 77% of a link's line rate (NCCL's authors count on 80%,
# github.com/NVIDIA/nccl-tests/issues/212). Cards on PCIe reach 20 GB/s (issue 178 there), whatever its generation:
# GeForce cards may not write into each other's memory, so their data pass through the host's.
_SHARE_OF_LINE_RATE = 230 / 300
_PCIE = 20


@dataclass(frozen=True)
class Gpu:
    """A card as its data sheet prints it."""

    name: str
    mebibytes: int
    """All that the driver shows."""
    bf16: float | None
    """Peak TFLOP/s of dense bf16 matrix products with fp32 sums; None where the card has no bf16."""
    fp32: float
    """Peak TFLOP/s in fp32."""
    links: float | None
    """GB/s of all links in both directions; None for PCIe."""
    note: str = ""
    """What a user of the card has to know."""

    @property
    def memory(self) -> int:
        return self.mebibytes * 2**20

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a ring of these cards passes through each of them (NCCL's "bus bandwidth"), inside one machine."""
        return (self.links / 2 * _SHARE_OF_LINE_RATE if self.links else _PCIE) * 1e9

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s in a dtype of the experiment file; UserError if the card cannot compute it."""
        if dtype == "bfloat16" and self.bf16 is None:
            raise UserError(f"{self.name} has no bfloat16: set model.dtype=float32, or plan for another --gpu")
        return (self.fp32 if dtype == "float32" else self.bf16) * 1e12


_SHEETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
GPUS = {sheet["name"]: Gpu(**sheet) for sheet in _SHEETS["gpus"]}


@dataclass(frozen=True)
class Machines:
    nodes: int
    ranks_per_node: int
    memory: float
    """Bytes that one rank may use: its GPU's, or its part of a CPU machine's."""
    peak: float | None = None
    """FLOP/s of one rank at its best; None where unknown (CPUs)."""
    bandwidth: float | None = None
    """Bytes/s that a ring of all ranks passes through each of them; None where unknown."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def local_machine(experiment: Experiment) -> Machines:
    """This machine's CPU ranks, each with its part of the memory that is free: the kernel's estimate, or what a container
    leaves."""
    processes = experiment.launch.processes
    ranks, free = 1 if processes == "auto" else processes, psutil.virtual_memory().available
    control = Path("/sys/fs/cgroup")
    try:
        limit = int((control / "memory.max").read_text())
        used = dict(line.split() for line in (control / "memory.stat").read_text().splitlines())["anon"]
        free = min(free, limit - int(used))  # cached files give way
    except (OSError, ValueError, KeyError):
        pass  # no container, or none with a limit ("max")
    return Machines(1, ranks, free / ranks)
