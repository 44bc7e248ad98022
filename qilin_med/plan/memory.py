"""Memory of one rank in training, from shapes alone.

Model states after ZeRO (Rajbhandari et al., arXiv:1910.02054, section 3 and figure 1), as DeepSpeed's optimizers keep them.
Activations after Korthikanti et al. (arXiv:2205.05198, section 4), counted tensor by tensor for the modules of
transformers and PEFT: what autograd saves, not what is computed. All sizes in bytes, `H` elements wide unless said.
"""

from dataclasses import dataclass, fields, replace

from qilin_med.config.experiment import LoraSettings
from qilin_med.plan.architecture import Architecture
from qilin_med.plan.engine import Engine

# NF4 with double quantisation (Dettmers et al., arXiv:2305.14314, section 3): 4 bits, an 8-bit scale per 64 weights, an
# fp32 scale per 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LOGITS_AT_ONCE = 2**24  # elements, see losses.py
CUDA_BYTES = 2**30  # a CUDA context with its libraries' workspaces and NCCL's buffers
PYTHON_BYTES = 800 * 2**20  # a rank's interpreter with torch and transformers loaded


@dataclass(frozen=True)
class Training:
    """One stage's update as one rank does it."""

    architecture: Architecture
    engine: Engine
    lora: LoraSettings | None
    dtype: str
    on_gpu: bool
    attention: str
    fused: bool
    checkpointing: bool
    ranks: int
    local_ranks: int
    """Ranks on one machine."""
    rows: int
    """Rows that a rank takes at once."""
    sequences: int
    """Sequences of a row: 2 in a preference pair, else 1."""
    length: int
    """Tokens of the longest sequence."""
    targets: float
    """Share of the tokens that a loss is taken on."""
    accumulates: bool
    """An update has several batches, so gradients outlive a backward pass."""

    @property
    def tokens(self) -> int:
        return self.rows * self.sequences * self.length

    @property
    def target_tokens(self) -> int:
        return round(self.tokens * self.targets)

    @property
    def trainable(self) -> int:
        return self.architecture.lora_parameters(self.lora) if self.lora else self.architecture.parameters

    @property
    def parameters(self) -> int:
        return self.architecture.parameters + (self.trainable if self.lora else 0)

    @property
    def compute_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def trained_bytes(self) -> int:
        """Of a weight that trains: DeepSpeed keeps fp32 copies itself, plain PyTorch trains fp32 weights."""
        return self.compute_bytes if self.engine.deepspeed else 4

    @property
    def stream_bytes(self) -> int:
        """Of the residual stream, which has the embedding's dtype."""
        return self.compute_bytes if self.lora else self.trained_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU (or of one rank's process) at the fullest moment of an update."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    loss: float = 0
    buckets: float = 0
    """Reduction buckets, and under ZeRO-3 the gathered parameters."""
    other: float = 0
    moment: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}


def plan_memory(training: Training) -> Memory:
    """The fullest moment of an update."""
    return max(moments(training), key=lambda memory: memory.total)


def moments(training: Training) -> list[Memory]:
    """Loss, last layer, first layer and embedding in the backward pass, optimizer step."""
    t, states = training, model_states(training)
    kept, layer, ends, working = saved_in_forward(t), layer_activations(t), end_activations(t), backward_working(t)
    matrix = 0 if t.lora else t.architecture.embedding * t.trained_bytes
    whole_layer = layer_gradients(t) if t.engine.shards_gradients else 0
    every = states.gradients
    early = every if t.accumulates or t.engine.shards_gradients else min(matrix, every)
    late = every if t.accumulates or t.engine.shards_gradients or t.architecture.tied else every - matrix
    # In fp32 the head's gradient is made with the loss, and copied when the backward pass takes it up.
    loss = loss_working(t) + matrix * (2 if t.compute_bytes == 4 else 1)
    last = kept + ends + working + (layer if t.checkpointing else 0)
    return [
        replace(states, gradients=early - min(early, matrix), activations=kept + ends, loss=loss, moment="loss"),
        replace(states, gradients=early + whole_layer, activations=last, moment="backward, last layer"),
        replace(states, gradients=late + whole_layer, activations=layer + working, moment="backward, first layer"),
        replace(states, gradients=every + (matrix if t.engine.shards_gradients else 0), moment="end of backward"),
        replace(states, gradients=every + step_gradients(t), buckets=0, moment="optimizer step"),
    ]


# --------------------------------------------------------------------------------------------------- model states


def model_states(training: Training) -> Memory:
    """Weights, gradients, optimizer states, buckets: what stays through a backward pass."""
    t, engine = training, training.engine
    return Memory(
        weights=weights_bytes(t) / (t.ranks if engine.shards_weights else 1) * (not engine.offload_parameters)
        + autocast_weights(t),
        gradients=0
        if engine.offload_optimizer
        else t.trainable * gradient_bytes(t) / share(t, engine.shards_gradients),
        optimizer=0 if engine.offload_optimizer else t.trainable * optimizer_bytes(t) / share(t, engine.zero >= 1),
        buckets=communication_bytes(t),
        other=CUDA_BYTES if t.on_gpu else PYTHON_BYTES,
    )


def share(training: Training, is_sharded: bool) -> int:
    return training.ranks if is_sharded else 1


def weights_bytes(training: Training) -> float:
    """Of the whole model, unsharded."""
    t, a = training, training.architecture
    if not t.lora:
        return a.parameters * t.trained_bytes
    frozen = a.parameters * t.compute_bytes
    if t.lora.quantization:
        linear = a.layers * a.linear_weights
        frozen += linear * (NF4_BYTES - t.compute_bytes)
    return frozen + t.trainable * t.trained_bytes


def autocast_weights(training: Training) -> int:
    """Without DeepSpeed bf16 arithmetic keeps bf16 copies of the fp32 matrices that it multiplies by."""
    t, a = training, training.architecture
    if t.trained_bytes == t.compute_bytes:
        return 0
    return t.compute_bytes * (t.trainable if t.lora else a.layers * a.linear_weights)


def gradient_bytes(training: Training) -> int:
    return 4 if training.engine.fp32_gradients else training.trained_bytes


def optimizer_bytes(training: Training) -> int:
    """Of a parameter: Adam's two moments in fp32, and DeepSpeed's fp32 master copy (4 + 4 + 4, ZeRO's K = 12)."""
    engine = training.engine
    copies = engine.deepspeed and (training.trained_bytes == 2 or engine.zero in (1, 2))
    return 12 if copies else 8


def step_gradients(training: Training) -> float:
    """DeepSpeed steps on a flat fp32 copy of the rank's gradients."""
    t = training
    if not t.engine.deepspeed or t.engine.offload_optimizer:
        return 0
    return 4 * t.trainable / share(t, t.engine.zero >= 1)


def communication_bytes(training: Training) -> float:
    t, engine = training, training.engine
    if not engine.deepspeed:
        return t.trainable * t.trained_bytes if t.ranks > 1 else 0  # DDP's buckets hold every gradient once more
    # Buckets are allocated whole; on a CPU memory that is never touched takes none.
    bucket = engine.reduce_bucket if t.on_gpu and engine.zero else min(engine.reduce_bucket, t.trainable)
    buckets = engine.buckets * bucket * t.compute_bytes
    if engine.shards_weights:
        return buckets + gathered_bytes(t)
    largest = 0 if t.lora else t.architecture.embedding
    return buckets + (largest * t.compute_bytes if engine.offload_optimizer else 0)


def gathered_bytes(training: Training) -> float:
    """ZeRO-3: whole parameters at once, at least the largest matrix with its gradient."""
    t, a = training, training.architecture
    largest = a.embedding * (1 if t.lora else 2)
    return max(largest, min(a.parameters, t.engine.live)) * t.compute_bytes


def layer_gradients(training: Training) -> float:
    """Gradients of the layer at work, whole until they are reduced."""
    t = training
    return (t.trainable / t.architecture.layers if t.lora else t.architecture.layer_parameters) * t.trained_bytes


# ---------------------------------------------------------------------------------------------------- activations


def saved_in_forward(training: Training) -> float:
    """Of all layers, at the end of the forward pass. Full recomputation keeps each layer's input alone."""
    t, a = training, training.architecture
    per_layer = t.tokens * t.stream_bytes * a.hidden if t.checkpointing else layer_activations(t)
    return a.layers * per_layer


def layer_activations(training: Training) -> float:
    """What autograd saves in one decoder layer."""
    per_token = norm_bytes(training) + attention_bytes(training) + mlp_bytes(training) + lora_bytes(training)
    return training.tokens * per_token


def norm_bytes(training: Training) -> float:
    """Two RMSNorms: the input in fp32; where weights train, the normed input and the next layer's input as well."""
    t, h = training, training.architecture.hidden
    saved = t.stream_bytes * h if t.fused else 4 * h
    if not t.lora:
        saved += (0 if t.fused else t.stream_bytes * h) + t.compute_bytes * h
    return 2 * saved


def attention_bytes(training: Training) -> float:
    """Queries, keys, values and the output; keys and values are repeated per query head where a mask is passed."""
    t, a, c = training, training.architecture, training.compute_bytes
    keys = a.kv_width if t.attention == "flash_attention_2" else a.query_width
    saved = 2 * c * (a.query_width + keys)
    if t.attention == "sdpa":
        saved += c * t.length  # the packed rows' mask as an additive bias, one for all heads
    if t.attention == "eager":
        saved += (4 + (c if c == 2 else 0)) * a.heads * t.length  # softmax in fp32, and cast
    if a.qk_norm:
        saved += (4 + (0 if t.lora else c)) * (a.query_width + a.kv_width)
    return saved


def mlp_bytes(training: Training) -> float:
    """Gate, up, SiLU(gate); where weights train, their product. The fused kernel recomputes SiLU."""
    t = training
    tensors = 2 + (not t.fused) + (not t.lora)
    return tensors * t.compute_bytes * t.architecture.intermediate


def lora_bytes(training: Training) -> float:
    """An adapter's own dropped-out input with its mask, and the low-rank product. Masks are bytes on a GPU."""
    t, c = training, training.compute_bytes
    if not t.lora:
        return 0
    adapted = t.architecture.adapted(t.lora)
    mask = 1 if t.on_gpu else c
    inputs = (c + mask) * sum(x.inputs for x in adapted) if t.lora.dropout else c * _distinct_inputs(training)
    return inputs + 2 * c * t.lora.rank * len(adapted)


def _distinct_inputs(training: Training) -> int:
    """Without dropout adapters save their input itself: q, k, v share one, gate and up one, o's is saved already."""
    names = {x.name.partition(".")[2][0]: x.inputs for x in training.architecture.adapted(training.lora)}
    attention, mlp = ("q", "k", "v"), ("g", "u")
    groups = [next((names[n] for n in group if n in names), 0) for group in (attention, mlp, ("d",))]
    return sum(groups)


def end_activations(training: Training) -> float:
    """Outside the layers: rotary tables, the final norm, hidden states at target positions."""
    t, a = training, training.architecture
    norm = 4 + (0 if t.lora else t.stream_bytes)
    per_token = norm * a.hidden + 2 * t.compute_bytes * a.head_dim + 3 * 8
    return t.tokens * per_token + t.target_tokens * t.compute_bytes * a.hidden


def backward_working(training: Training) -> float:
    """Tensors of a layer's backward pass that are neither saved nor parameters' gradients, at their most in the MLP."""
    t, a = training, training.architecture
    quantised = 2 * a.hidden * a.intermediate if t.lora and t.lora.quantization else 0  # one matrix in bf16
    return t.tokens * t.compute_bytes * (a.intermediate + 2 * a.hidden) + quantised


def loss_working(training: Training) -> float:
    """Chunked cross-entropy: one chunk of logits in fp32 (and in bf16), and the gradient of the hidden states."""
    t, a, c = training, training.architecture, training.compute_bytes
    positions = min(max(64, LOGITS_AT_ONCE // a.vocabulary), t.target_tokens)
    chunk = positions * a.vocabulary * (4 + (2 if c == 2 else 0))
    gradient = t.target_tokens * a.hidden * c
    if t.on_gpu or c == 4:
        return chunk + gradient
    # On a CPU bf16 goes through fp32 copies of the head, of its gradient and of the hidden states' gradient.
    return chunk + gradient + 4 * (t.target_tokens * a.hidden + a.embedding * (1 if t.lora else 2))
