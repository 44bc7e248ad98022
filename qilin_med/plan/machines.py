"""Machines: graphics cards with their memory, peak arithmetic and links, and what this machine has free."""

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


# FLOP/s without sparsity and GB/s of NVLink from NVIDIA's data sheets (A100, H100 SXM, H200 SXM, L40S, V100 SXM2) and
# architecture white papers (GA102: 3090; Ada: 4090; RTX Blackwell: 5090). The cards for China have no public sheet at
# NVIDIA: A800 and H800 are A100 and H100 with 400 GB/s of NVLink; H20 and L20 as vendors print them and verl's table
# of peaks has them (github.com/volcengine/verl, utils/flops_counter.py). Ascend: the 910B3 of Huawei's Atlas 800T A2,
# 7 HCCS links of 56 GB/s (support.huawei.com, EDDOC1100317202); a 910B2 has 376 TFLOP/s, verl's table says 354.
# Memory as nvidia-smi shows it: the sheets' figures less what ECC takes.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 40_960, 312, 19.5, 600),
        Gpu("a100-80g", 81_920, 312, 19.5, 600),
        Gpu("a800-80g", 81_920, 312, 19.5, 400),
        Gpu("h100-80g", 81_559, 989, 67, 900),
        Gpu("h800-80g", 81_559, 989, 67, 400),
        Gpu("h200-141g", 143_771, 989, 67, 900),
        Gpu("h20-96g", 97_871, 148, 44, 900),
        Gpu("l20-48g", 46_068, 119.5, 59.8, None),
        Gpu("l40s-48g", 46_068, 362, 91.6, None),
        Gpu("3090-24g", 24_576, 71, 35.6, None),
        Gpu("4090-24g", 24_564, 165.2, 82.6, None),
        Gpu("5090-32g", 32_607, 209.5, 104.8, None),
        Gpu("v100-32g", 32_768, None, 15.7, 300),
        Gpu(
            "910b-64g", 65_536, 313, 78, 392, "for planning only: torch-npu is not part of this pipeline's environment"
        ),
    )
}


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
