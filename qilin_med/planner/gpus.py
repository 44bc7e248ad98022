"""Graphics cards: memory and peak arithmetic."""

from dataclasses import dataclass

from qilin_med.errors import UserError

_MIB, _TERA = 2**20, 1e12


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes, all that the driver shows."""
    bf16: float | None
    """Peak FLOP/s of dense bf16 matrix products with fp32 sums; None where the card has no bf16."""
    fp32: float
    """Peak FLOP/s in fp32."""

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s in a dtype of the experiment file; UserError if the card cannot compute it."""
        if dtype == "float32":
            return self.fp32
        if self.bf16 is None:
            raise UserError(f"{self.name} has no bfloat16: set model.dtype=float32, or plan for another --gpu")
        return self.bf16


def _gpu(name: str, mebibytes: int, bf16: float | None, fp32: float) -> Gpu:
    return Gpu(name, mebibytes * _MIB, bf16 * _TERA if bf16 else None, fp32 * _TERA)


# FLOP/s without sparsity from NVIDIA's data sheets (A100, H100 SXM, H200 SXM, L40S, V100 SXM2) and architecture white
# papers (GA102: 3090; Ada: 4090). Memory as nvidia-smi shows it: the sheets' figures less what ECC takes.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 40_960, 312, 19.5),
        _gpu("a100-80g", 81_920, 312, 19.5),
        _gpu("h100-80g", 81_559, 989, 67),
        _gpu("h200-141g", 143_771, 989, 67),
        _gpu("l40s-48g", 46_068, 362, 91.6),
        _gpu("3090-24g", 24_576, 71, 35.6),
        _gpu("4090-24g", 24_564, 165.2, 82.6),
        _gpu("v100-32g", 32_768, None, 15.7),
    )
}
