"""What a model's config.json says about its size: Llama and those built like it (Mistral, Qwen2, Qwen3)."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import LoraSettings
from qilin_med.errors import UserError

# Biases of q, k, v and of o, and norms of q and k, where config.json does not say (transformers' modeling files).
_FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True, "output_bias": False},
    "qwen3": {"qk_norm": True},
}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer: weight [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Architecture:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The output head is the embedding matrix."""
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm on every head of queries and keys."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer."""
        attention, mlp = self.attention_bias, self.mlp_bias
        return (
            Linear("self_attn.q_proj", self.hidden, self.query_width, attention),
            Linear("self_attn.k_proj", self.hidden, self.kv_width, attention),
            Linear("self_attn.v_proj", self.hidden, self.kv_width, attention),
            Linear("self_attn.o_proj", self.query_width, self.hidden, self.output_bias),
            Linear("mlp.gate_proj", self.hidden, self.intermediate, mlp),
            Linear("mlp.up_proj", self.hidden, self.intermediate, mlp),
            Linear("mlp.down_proj", self.intermediate, self.hidden, mlp),
        )

    @property
    def linear_weights(self) -> int:
        """Elements of one decoder layer's weight matrices."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return sum(linear.parameters for linear in self.linears) + norms

    @property
    def embedding(self) -> int:
        """Parameters of the embedding matrix, and of the output head: the largest single matrices."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.embedding * (1 if self.tied else 2) + self.layers * self.layer_parameters + self.hidden

    def adapted(self, lora: LoraSettings) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer that get an adapter, by PEFT's rules; UserError if none does."""
        wanted = lora.target_modules
        if wanted == "all-linear":
            return self.linears
        if isinstance(wanted, str):
            found = tuple(x for x in self.linears if re.fullmatch(wanted, f"model.layers.0.{x.name}"))
        else:
            found = tuple(x for x in self.linears if any(f".{x.name}".endswith(f".{name}") for name in wanted))
        if not found:
            names = ", ".join(linear.name.partition(".")[2] for linear in self.linears)
            raise UserError(f"lora.target_modules {wanted!r} names none of {names}")
        return found

    def lora_parameters(self, lora: LoraSettings) -> int:
        """A [rank, inputs] and B [outputs, rank] beside every adapted layer (Hu et al., arXiv:2106.09685)."""
        return self.layers * sum(lora.rank * (linear.inputs + linear.outputs) for linear in self.adapted(lora))


def read_architecture(path: Path) -> Architecture:
    """From a config.json, or a folder that holds one; UserError if it is not of a family above."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist; get the model, or name its config.json with --model-config (those of"
            " Baichuan-7B and others lie in configs/architectures)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable config.json ({error})") from None
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{file}: model_type {family!r} cannot be planned; known: {', '.join(_FAMILIES)}")
    try:
        return _from_config({**_FAMILIES[family], **{k: v for k, v in config.items() if v is not None}})
    except KeyError as error:
        raise UserError(f"{file}: the key {error} is missing") from None


def _from_config(config: dict[str, Any]) -> Architecture:
    bias = config.get("attention_bias", False)
    return Architecture(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        head_dim=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=config.get("output_bias", bias),
        mlp_bias=config.get("mlp_bias", False),
        qk_norm=config.get("qk_norm", False),
    )
