"""Floating-point operations of training: 2 per weight and token in every matrix product.

Kaplan et al. (arXiv:2001.08361, section 2.1) and PaLM's appendix B (arXiv:2204.02311): 2N forward, 4N backward, plus
attention; Hoffmann et al. (arXiv:2203.15556, appendix F). Frozen weights need no gradients of their own (2N backward),
recomputation adds a forward pass. Embeddings, norms and softmax are left out.
"""

from dataclasses import dataclass, replace

from qilin_med.plan.memory import Training


@dataclass(frozen=True)
class Work:
    """Tokens of some training, as computed: a preference pair's question counts twice."""

    tokens: float
    targets: float
    """Tokens that a loss is taken on."""


def training_flops(training: Training, work: Work) -> float:
    """Forward and backward over `work`, recomputation included."""
    t = training
    layers = layers_flops(t, work.tokens)
    # A frozen matrix hands gradients on and gets none; PyTorch's attention recomputes its scores, 5 products for 2.
    linear = matrices_flops(t, work.tokens) * (1 if t.lora else 2) + 2 * adapter_flops(t, work.tokens)
    linear -= unneeded_flops(t, work.tokens)
    backward = linear + 2.5 * attention_flops(t, work.tokens)
    recomputed = layers - skipped_flops(t, work.tokens) if t.checkpointing else 0
    return layers + backward + recomputed + head_flops(t, work.targets)


def model_flops(training: Training, work: Work) -> float:
    """Forward and backward with nothing computed twice, and attention over whole squares, as PaLM's MFU counts them."""
    t = training
    passes = 2 if t.lora else 3  # a frozen matrix gets no gradient of its own
    square = attention_flops(replace(t, attention="sdpa"), work.tokens)
    head = 2 * t.architecture.embedding * work.targets
    return passes * (matrices_flops(t, work.tokens) + head) + 3 * (adapter_flops(t, work.tokens) + square)


def forward_flops(training: Training, work: Work) -> float:
    return layers_flops(training, work.tokens) + 2 * training.architecture.embedding * work.targets


def reference_flops(training: Training, work: Work) -> float:
    """The forward pass of the reference over all pairs, once before DPO."""
    t = training
    head = 2 * t.architecture.embedding * work.targets
    return matrices_flops(t, work.tokens) + attention_flops(t, work.tokens) + head


def layers_flops(training: Training, tokens: float) -> float:
    t = training
    return matrices_flops(t, tokens) + adapter_flops(t, tokens) + attention_flops(t, tokens)


def matrices_flops(training: Training, tokens: float) -> float:
    a = training.architecture
    return 2 * a.layers * a.linear_weights * tokens


def adapter_flops(training: Training, tokens: float) -> float:
    return 2 * training.trainable * tokens if training.lora else 0


def attention_flops(training: Training, tokens: float) -> float:
    """Scores and values over the whole square of a row; FlashAttention leaves out what the causal mask hides."""
    a = training.architecture
    square = 4 * a.layers * a.query_width * training.length * tokens
    return square / 2 if training.attention == "flash_attention_2" else square


def unneeded_flops(training: Training, tokens: float) -> float:
    """Below the first layer's frozen matrices nothing trains, so none needs their gradients (recomputation asks for them)."""
    a = training.architecture
    inputs = a.hidden * (a.query_width + 2 * a.kv_width)
    return 2 * inputs * tokens if training.lora and not training.checkpointing else 0


def skipped_flops(training: Training, tokens: float) -> float:
    """Recomputation ends at the last tensor that is needed, before the layer's last product."""
    a = training.architecture
    return 0 if training.lora else 2 * a.layers * a.intermediate * a.hidden * tokens


def head_flops(training: Training, targets: float) -> float:
    """Logits, gradients of hidden states and head; in bf16 logits are computed again in the backward pass."""
    products = 2 + (not training.lora) + (training.compute_bytes == 2)
    return 2 * training.architecture.embedding * targets * products
