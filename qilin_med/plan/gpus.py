"""Graphics cards: memory, peak arithmetic, and how fast they exchange data."""

from dataclasses import dataclass

from qilin_med.errors import UserError

_MIB, _GIGA, _TERA = 2**20, 1e9, 1e12
# What a ring of 8 A100s reaches over NVSwitch, 230 GB/s, is 77% of a link's line rate (NCCL's authors count on 80%,
# github.com/NVIDIA/nccl-tests/issues/212). Cards on PCIe reach 20 GB/s (issue 178 there), whatever its generation:
# GeForce cards may not write into each other's memory, so their data pass through the host's.
_SHARE_OF_LINE_RATE = 230 / 300
_PCIE = 20


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes, all that the driver shows."""
    bf16: float | None
    """Peak FLOP/s of dense bf16 matrix products with fp32 sums; None where the card has no bf16."""
    fp32: float
    """Peak FLOP/s in fp32."""
    bandwidth: float
    """Bytes/s that a ring of these cards passes through each of them (NCCL's "bus bandwidth"), inside one machine."""
    note: str = ""
    """What a user of the card has to know."""

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s in a dtype of the experiment file; UserError if the card cannot compute it."""
        if dtype == "float32":
            return self.fp32
        if self.bf16 is None:
            raise UserError(f"{self.name} has no bfloat16: set model.dtype=float32, or plan for another --gpu")
        return self.bf16


def _gpu(name: str, mebibytes: int, bf16: float | None, fp32: float, links: float | None, note: str = "") -> Gpu:
    """`links`: GB/s of all links of a card in both directions, as data sheets print it; None for PCIe."""
    bandwidth = links / 2 * _SHARE_OF_LINE_RATE if links else _PCIE
    return Gpu(name, mebibytes * _MIB, bf16 * _TERA if bf16 else None, fp32 * _TERA, bandwidth * _GIGA, note)


# FLOP/s without sparsity and GB/s of NVLink from NVIDIA's data sheets (A100, H100 SXM, H200 SXM, L40S, V100 SXM2) and
# architecture white papers (GA102: 3090; Ada: 4090; RTX Blackwell: 5090). The cards for China have no public sheet at
# NVIDIA: A800 and H800 are A100 and H100 with 400 GB/s of NVLink; H20 and L20 as vendors print them and verl's table
# of peaks has them (github.com/volcengine/verl, utils/flops_counter.py). Ascend: the 910B3 of Huawei's Atlas 800T A2,
# 7 HCCS links of 56 GB/s (support.huawei.com, EDDOC1100317202); a 910B2 has 376 TFLOP/s, verl's table says 354.
# Memory as nvidia-smi shows it: the sheets' figures less what ECC takes.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 40_960, 312, 19.5, 600),
        _gpu("a100-80g", 81_920, 312, 19.5, 600),
        _gpu("a800-80g", 81_920, 312, 19.5, 400),
        _gpu("h100-80g", 81_559, 989, 67, 900),
        _gpu("h800-80g", 81_559, 989, 67, 400),
        _gpu("h200-141g", 143_771, 989, 67, 900),
        _gpu("h20-96g", 97_871, 148, 44, 900),
        _gpu("l20-48g", 46_068, 119.5, 59.8, None),
        _gpu("l40s-48g", 46_068, 362, 91.6, None),
        _gpu("3090-24g", 24_576, 71, 35.6, None),
        _gpu("4090-24g", 24_564, 165.2, 82.6, None),
        _gpu("5090-32g", 32_607, 209.5, 104.8, None),
        _gpu("v100-32g", 32_768, None, 15.7, 300),
        _gpu(
            "910b-64g", 65_536, 313, 78, 392, "for planning only: torch-npu is not part of this pipeline's environment"
        ),
    )
}
