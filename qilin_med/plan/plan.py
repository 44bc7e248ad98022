"""One stage of an experiment on given machines: memory, operations and disk.

What the model and its loss take is measured (measure.py). What becomes of weights, gradients and optimizer states is priced
here: the model states of ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3 and figure 1) as DeepSpeed 0.19.8 keeps them.
"""

import json
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from qilin_med.config.experiment import Experiment, ModelConfig, StageConfig, StageName, read_deepspeed
from qilin_med.config.schedule import Schedule, make_schedule
from qilin_med.plan.data import Amount, row_shape
from qilin_med.plan.machines import Machines
from qilin_med.plan.measure import Costs, measure, read_config

MARGIN = 0.10  # by how much the estimate of memory may be off (tests/test_planner.py holds it to that)
# NF4 with double quantisation (Dettmers et al., arXiv:2305.14314, section 3): 4 bits, an 8-bit scale per 64 weights, an
# fp32 scale per 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
CUDA_BYTES = 2**30  # a CUDA context with its libraries' workspaces and NCCL's buffers
PYTHON_BYTES = 800 * 2**20  # a rank's interpreter with torch and transformers loaded
# Most logits to measure with: several chunks of the loss (losses.py), so that more rows only repeat them.
CHUNKS = 2**28


@dataclass(frozen=True)
class Engine:
    """A DeepSpeed file, or plain PyTorch. Sizes are in elements, DeepSpeed's own unit."""

    zero: int | None = None
    """Stage of ZeRO; None: plain PyTorch, DDP where there are several ranks."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    fp32_gradients: bool = False
    """Gradients are accumulated in fp32 (`data_types.grad_accum_dtype`)."""
    reduce_bucket: int | None = 500_000_000
    """None: the size that transformers fills in for "auto", the hidden size squared."""
    overlaps: bool = False
    """ZeRO-1 and 2: communication goes on in the background, which takes a second bucket."""
    live: int = 1_000_000_000
    """ZeRO-3: most parameters gathered at once."""

    @property
    def name(self) -> str:
        if self.zero is None:
            return "plain PyTorch"
        return f"ZeRO-{self.zero}{' + offload' if self.offload_optimizer else ''}"

    def like(self, zero: int, offload: bool) -> "Engine":
        """This engine at another stage of ZeRO as our own files have it, other settings kept."""
        bucket = None if zero == 3 else self.reduce_bucket
        own = {"offload_optimizer": offload, "offload_parameters": offload and zero == 3, "overlaps": zero in (1, 2)}
        return replace(self, zero=zero, reduce_bucket=bucket, **own)


def read_engine(deepspeed: dict[str, Any] | None) -> Engine:
    """From the contents of a DeepSpeed file (None: plain PyTorch)."""
    if deepspeed is None:
        return Engine()
    zero = deepspeed.get("zero_optimization", {})
    stage, bucket = zero.get("stage", 0), zero.get("reduce_bucket_size", Engine.reduce_bucket)
    offload = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    return Engine(
        stage,
        *(settings.get("device", "none") != "none" for settings in offload),
        fp32_gradients=deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        reduce_bucket=None if bucket == "auto" else int(bucket),
        overlaps=stage in (1, 2) and bool(zero.get("overlap_comm")),
        live=int(zero.get("stage3_max_live_parameters", Engine.live)),
    )


class Memory(NamedTuple):
    """Bytes on one GPU (or of one rank's process) at one moment of an optimizer step."""

    moment: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """All that the passes and the loss hold beside weights and gradients."""
    buckets: float
    """Reduction buckets, and under ZeRO-3 the gathered parameters."""
    other: float

    @property
    def total(self) -> float:
        return sum(self[1:])

    def parts(self) -> dict[str, float]:
        return dict(list(self._asdict().items())[1:])


class Work(NamedTuple):
    """Tokens of some training, as computed: a preference pair's question counts twice."""

    tokens: float
    targets: float
    """Tokens that a loss is taken on."""


@dataclass(frozen=True)
class StagePlan:
    stage: StageName
    section: StageConfig
    model: ModelConfig
    on_gpu: bool
    config: str
    """Contents of the model's config.json."""
    machines: Machines
    engine: Engine
    amount: Amount | None
    schedule: Schedule
    """As the experiment has it; where the amount of data is unknown, of 0 rows."""
    sample: int
    """Rows to measure with, and twice as many."""

    def changed(self, **settings: Any) -> "StagePlan":
        """The plan with other settings of its section."""
        return replace(self, section=self.section.model_copy(update=settings))

    # ------------------------------------------------------------------------------------------------------- shape

    @property
    def rows(self) -> int:
        """Blocks, conversations or pairs that a rank takes at once."""
        return self.section.batch_size_per_device

    @property
    def sequences(self) -> int:
        return 2 if self.stage == "dpo" else 1

    @property
    def row_tokens(self) -> int:
        return self.sequences * self.length

    @property
    def length(self) -> int:
        """Tokens of the longest sequence. Blocks are full, however short their documents are."""
        longest, _ = row_shape(self.section)
        known = self.amount and self.stage != "pretraining" and self.amount.longest
        return min(longest, known or longest)

    @property
    def rows_of_a_rank(self) -> int:
        """A rank's part of an optimizer step, more than which it never takes at once."""
        return self.schedule.batch_size * self.schedule.accumulation

    @property
    def accumulation(self) -> int:
        return self.rows_of_a_rank // self.rows

    @property
    def quantized(self) -> bool:
        return bool(self.section.lora and self.section.lora.quantization)

    # ---------------------------------------------------------------------------------------------------- measured

    @property
    def request(self) -> dict[str, Any]:
        """All that the measurement depends on, as `fake_run.measure` takes it."""
        section = self.section
        packs = section.isolate_documents if self.stage == "pretraining" else section.packing
        return {
            "config": self.config,
            "dtype": self.model.dtype,
            "trained_dtype": "float32" if self.trained_bytes == 4 else "bfloat16",
            "lora": section.lora and section.lora.model_dump(exclude={"quantization"}),
            "attention": self.model.attention,
            "masked": packs and self.model.attention != "flash_attention_2",
            "fused": self.model.fused_kernels,
            "checkpointing": section.activation_checkpointing,
            "on_gpu": self.on_gpu,
            "sequences": self.sequences,
            "length": self.length,
            "targets": row_shape(section)[1],
            "rows": self.sample,
        }

    @cached_property
    def costs(self) -> Costs:
        return measure(json.dumps(self.request, sort_keys=True))

    def cost(self, name: str) -> float:
        constant, each_row = self.costs[name]
        return constant + each_row * self.rows

    @property
    def parameters(self) -> int:
        return round(self.cost("parameters"))

    @property
    def trainable(self) -> int:
        return round(self.cost("trainable"))

    @property
    def base_parameters(self) -> int:
        """Without adapters."""
        return self.parameters - (self.trainable if self.section.lora else 0)

    # ------------------------------------------------------------------------------------------------------ memory

    @property
    def compute_bytes(self) -> int:
        return 2 if self.model.dtype == "bfloat16" else 4

    @property
    def trained_bytes(self) -> int:
        """Of a weight that trains: DeepSpeed keeps fp32 copies itself, plain PyTorch trains fp32 weights."""
        return 4 if self.engine.zero is None else self.compute_bytes

    @property
    def gradient_bytes(self) -> int:
        return 4 if self.engine.fp32_gradients else self.trained_bytes

    def share(self, stage: int) -> int:
        """Ranks among which is divided what ZeRO divides from this stage on."""
        return self.machines.ranks if (self.engine.zero or 0) >= stage else 1

    @property
    def weights_bytes(self) -> float:
        """Of the whole model, unsharded."""
        if not self.section.lora:
            return self.parameters * self.trained_bytes
        frozen = self.base_parameters * self.compute_bytes
        frozen += self.cost("linear") * (NF4_BYTES - self.compute_bytes) if self.quantized else 0
        return frozen + self.trainable * self.trained_bytes

    @property
    def bucket_bytes(self) -> float:
        engine, largest = self.engine, self.cost("largest")
        if engine.zero is None:  # DDP's buckets hold every gradient once more
            return self.trainable * self.trained_bytes if self.machines.ranks > 1 else 0
        bucket = engine.reduce_bucket if engine.reduce_bucket is not None else self.cost("hidden") ** 2
        if not (self.on_gpu and engine.zero):  # on a CPU memory that is never touched takes none
            bucket = min(bucket, self.trainable)
        elements = (2 if engine.overlaps else 1) * bucket
        if engine.zero == 3:  # whole parameters, at least the largest with its gradient
            elements += max(largest * (1 if self.section.lora else 2), min(self.base_parameters, engine.live))
        elif engine.offload_optimizer and not self.section.lora:
            elements += largest
        return elements * self.compute_bytes

    @cached_property
    def moments(self) -> list[Memory]:
        """The fullest moments of an optimizer step: each phase of the passes, their end, the optimizer."""
        engine, kept_on_host = self.engine, self.engine.offload_optimizer
        all_gradients = 0 if kept_on_host else self.trainable * self.gradient_bytes / self.share(2)
        # Adam's two moments in fp32, and DeepSpeed's fp32 master copy (4 + 4 + 4, ZeRO's K = 12).
        copies = engine.zero is not None and (self.trained_bytes == 2 or engine.zero in (1, 2))
        states = Memory(
            "end of backward",
            weights=0 if engine.offload_parameters else self.weights_bytes / self.share(3),
            gradients=all_gradients,
            optimizer=0 if kept_on_host else self.trainable * (12 if copies else 8) / self.share(1),
            activations=0,
            buckets=self.bucket_bytes,
            other=CUDA_BYTES if self.on_gpu else PYTHON_BYTES,
        )
        sharded = (engine.zero or 0) >= 2
        stay = sharded or engine.fp32_gradients or self.accumulation > 1  # in place from the first pass on
        # A layer's gradients are whole until they are reduced.
        layer = self.cost("trainable of a layer") * self.trained_bytes if sharded else 0
        unpacked = 2 * self.cost("largest linear") if self.quantized else 0  # one 4-bit matrix in bf16
        moments = []
        for phase, moment in _PHASES.items():
            complete = all_gradients if stay else min(self.cost(f"gradients before {phase}"), all_gradients)
            gradients = complete + (layer if phase in ("last", "first") else 0)
            activations = self.cost(phase) + unpacked
            moments.append(states._replace(moment=moment, gradients=gradients, activations=activations))
        # DeepSpeed steps on a flat fp32 copy of the rank's gradients.
        flat = 0 if engine.zero is None or kept_on_host else 4 * self.trainable / self.share(1)
        return [*moments, states, states._replace(moment="optimizer step", gradients=all_gradients + flat, buckets=0)]

    @property
    def memory(self) -> Memory:
        """The fullest moment of all."""
        return max(self.moments, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        return self.memory.total * (1 + MARGIN) <= self.machines.memory

    @property
    def verdict(self) -> str:
        if self.fits:
            return "fits"
        return "does not fit" if self.memory.total * (1 - MARGIN) > self.machines.memory else "may not fit"

    def largest_batch(self, most: int) -> int:
        """Rows at once that fit, at most `most`; 0 if not even one does."""
        sizes = range(1, most + 1)
        return bisect_left(sizes, True, key=lambda rows: not self.changed(batch_size_per_device=rows).fits)

    # -------------------------------------------------------------------------------------------- disk and host memory

    @property
    def checkpoint_bytes(self) -> float:
        """One training checkpoint: what trains (weights, and DeepSpeed's own copy of them), and the optimizer's states."""
        if self.engine.zero is None:
            return self.trainable * (self.trained_bytes + 8)
        return self.trainable * (2 * self.trained_bytes + (12 if self.engine.zero or self.compute_bytes == 2 else 8))

    @property
    def merged_bytes(self) -> float:
        """The published model, and the adapter beside it."""
        adapter = self.trainable * self.trained_bytes if self.section.lora else 0
        return self.base_parameters * self.compute_bytes + adapter

    @property
    def disk(self) -> float:
        """Checkpoints kept and one more, as the oldest goes only when the newest is complete; then the merged model."""
        return (self.section.keep_checkpoints + 1) * self.checkpoint_bytes + self.merged_bytes

    @property
    def offloaded(self) -> float:
        """One machine's part of what DeepSpeed keeps in host memory: fp32 weights, moments and gradients (4 + 8 + 4)."""
        if not self.engine.offload_optimizer:
            return 0
        # ZeRO-1 and 2 write updated weights through a buffer; parameters that are offloaded stay.
        weights = self.weights_bytes if self.engine.offload_parameters else self.trainable * self.gradient_bytes
        return (self.trainable * 16 + weights) / self.machines.ranks * self.machines.ranks_per_node

    @property
    def host(self) -> float:
        """Memory of one machine beside its GPUs: each rank loads the model, then keeps what is offloaded; one merges an
        adapter, in fp32."""
        lora, size = self.section.lora, self.base_parameters
        loading = self.machines.ranks_per_node * size * (self.compute_bytes if lora else self.trained_bytes)
        return max(loading, self.offloaded, size * (4 if lora else self.compute_bytes))

    # -------------------------------------------------------------------------------------------------- operations

    def _each(self, name: str) -> float:
        """Operations of a token, or in the loss of a target."""
        targets = self.row_tokens * row_shape(self.section)[1]
        return self.costs[name][1] / (targets if name.startswith("loss") else self.row_tokens)

    @property
    def _attended(self) -> float:
        """Share of a row's square that the attention kernel computes; FlashAttention leaves out what lies ahead."""
        return 0.5 if self.model.attention == "flash_attention_2" else 1.0

    def forward_flops(self, work: Work) -> float:
        layers = self._each("forward matrices") + self._attended * self._each("forward attention")
        return layers * work.tokens + 2 * self.cost("head") * work.targets

    def training_flops(self, work: Work) -> float:
        """Forward and backward, recomputation included."""
        attention = self._attended * (self._each("forward attention") + self._each("backward attention"))
        matrices = self._each("forward matrices") + self._each("backward matrices")
        return (matrices + attention) * work.tokens + self._each("loss matrices") * work.targets

    def model_flops(self, work: Work) -> float:
        """Forward and backward with nothing computed twice, and attention over whole squares, as PaLM's MFU counts them
        (arXiv:2204.02311, appendix B)."""
        # A frozen matrix gets no gradient of its own.
        adapter, passes = (2 * self.trainable, 2) if self.section.lora else (0, 3)
        frozen = self._each("forward matrices") - adapter
        layers = passes * frozen + 3 * (adapter + self._each("forward attention"))
        return layers * work.tokens + passes * 2 * self.cost("head") * work.targets

    @property
    def reference_flops(self) -> float:
        """Of the forward pass of the reference over all pairs, once before DPO."""
        if self.stage != "dpo":
            return 0
        data = self.work(whole=False)
        return self.forward_flops(data) - 2 * self.trainable * data.tokens

    def work(self, whole: bool = True) -> Work | None:
        """What the stage computes on its data (not `whole`: in one pass over them); None where the data are unknown."""
        if not self.amount:
            return None
        amount, passes = self.amount, self.schedule.epochs if whole else 1
        tokens = 2 * amount.tokens - amount.trained if self.stage == "dpo" else amount.tokens
        if not getattr(self.section, "packing", True):  # every sequence as long as the longest
            tokens = amount.rows * self.row_tokens
        return Work(tokens * passes, amount.trained * passes)

    @property
    def step_work(self) -> Work:
        """One optimizer step of rows that are as long as they may be."""
        tokens = self.schedule.global_batch_size * self.row_tokens
        return Work(tokens, tokens * row_shape(self.section)[1])


_PHASES = {
    "forward": "forward",
    "loss": "loss",
    "last": "backward, last layer",
    "first": "backward, first layer",
    "embedding": "backward, embedding",
}


def plan_stage(
    experiment: Experiment, stage: StageName, model_config: Path, machines: Machines, amount: Amount | None = None
) -> StagePlan:
    """`model_config`: a config.json, or a folder with one. UserError: it is not there, batch sizes that do not divide, an
    unreadable DeepSpeed file, adapters on layers that are not there; `Unmeasured`."""
    section, config = experiment.stage(stage), read_config(model_config)
    schedule = make_schedule(stage, section, amount.rows if amount else 0, machines.ranks)
    values = json.loads(config)
    vocabulary = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size", 2**16)
    engine = read_engine(read_deepspeed(section.deepspeed))
    on_gpu = experiment.launch.device == "cuda"
    plan = StagePlan(stage, section, experiment.model, on_gpu, config, machines, engine, amount, schedule, sample=1)
    most = int(CHUNKS / (vocabulary * plan.row_tokens * row_shape(section)[1]))
    plan = replace(plan, sample=2 ** (max(1, min(section.batch_size_per_device, most)).bit_length() - 1))
    _ = plan.costs  # so that what cannot be measured is said here
    return plan
