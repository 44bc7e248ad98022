"""What a stage's DeepSpeed file makes of the model states: who keeps which part, and where."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Engine:
    """Sizes are in elements, DeepSpeed's own unit."""

    deepspeed: bool
    """False: plain PyTorch, DDP where there are several ranks."""
    zero: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    fp32_gradients: bool = False
    """Gradients are accumulated in fp32 (`data_types.grad_accum_dtype`)."""
    reduce_bucket: int = 500_000_000
    buckets: int = 1
    """Reduction buckets that exist at once; communication in the background needs two."""
    live: int = 1_000_000_000
    """ZeRO-3: most parameters gathered at once."""

    @property
    def shards_optimizer(self) -> bool:
        return self.zero >= 1

    @property
    def shards_gradients(self) -> bool:
        return self.zero >= 2

    @property
    def shards_weights(self) -> bool:
        return self.zero >= 3

    @property
    def name(self) -> str:
        if not self.deepspeed:
            return "plain PyTorch"
        offloaded = " + offload" if self.offload_optimizer else ""
        return f"ZeRO-{self.zero}{offloaded}"

    def like(self, zero: int, offload: bool, hidden: int) -> "Engine":
        """This engine at another stage of ZeRO, other settings kept."""
        bucket = hidden * hidden if zero == 3 and not self.shards_weights else self.reduce_bucket
        return replace(
            self,
            deepspeed=True,
            zero=zero,
            offload_optimizer=offload,
            offload_parameters=offload and zero == 3,
            reduce_bucket=bucket,
            buckets=2 if zero in (1, 2) else 1,
        )


def read_engine(deepspeed: dict[str, Any] | None, hidden: int) -> Engine:
    """From the contents of a DeepSpeed file (None: plain PyTorch). "auto" sizes are those that transformers fills in."""
    if deepspeed is None:
        return Engine(deepspeed=False, zero=0)
    zero = deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    defaults = Engine(deepspeed=True, zero=stage)
    bucket = zero.get("reduce_bucket_size", defaults.reduce_bucket)
    return Engine(
        deepspeed=True,
        zero=stage,
        offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offload_parameters=_is_offloaded(zero, "offload_param"),
        fp32_gradients=deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        reduce_bucket=hidden * hidden if bucket == "auto" else int(bucket),
        buckets=2 if stage in (1, 2) and zero.get("overlap_comm") else 1,
        live=int(zero.get("stage3_max_live_parameters", defaults.live)),
    )


def _is_offloaded(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") != "none"
