"""Forward and backward of a stage's real model and loss on fake tensors: bytes alive and operations, counted one by one.

A PyTorch without CUDA cannot differentiate a GPU's tensors, fake or not. So all tensors are the CPU's, and where a GPU runs
another kernel, a stand-in allocates and multiplies what that kernel does.
"""

import json
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, product
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import linear_cross_entropy as chunked
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from qilin_med.config.experiment import LoraSettings
from qilin_med.errors import UserError
from qilin_med.model.load import DTYPES, lora_config
from qilin_med.model.losses import forward_through_head, token_losses, unwrap

aten = torch.ops.aten
# To PyTorch's modes the chunked loss is one operator. Run as the Python that it is, it shows what it allocates.
_OPAQUE = {
    operator._opoverload: operator._init_fn
    for operator in (
        chunked._linear_cross_entropy_batch_chunked,
        chunked._linear_cross_entropy_batch_chunked_no_reduction,
    )
}
# Attention's products of activations: 2 forward, 5 backward, where the scores are computed again. PyTorch's own formulas
# refuse fewer heads of keys than of queries.
_PRODUCTS = {
    aten._scaled_dot_product_flash_attention: 2,
    aten._scaled_dot_product_efficient_attention: 2,
    aten._scaled_dot_product_flash_attention_for_cpu: 2,
    aten._scaled_dot_product_flash_attention_backward: 5,
    aten._scaled_dot_product_efficient_attention_backward: 5,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}
PHASES = ("forward", "loss", "last", "first", "embedding")


class Meter(TorchDispatchMode):
    """Bytes of all storages alive and operations, by phase: forward, loss, then whose backward pass is under way: last, middle
    or first decoder layer, or embedding. A parameter's gradient counts apart once it is complete, since engines differ in
    what becomes of it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.phase, self.live, self.gradients = "forward", 0, 0
        self.most: Counter = Counter()
        self.operations: Counter = Counter()
        self.complete: Counter = Counter()
        self.seen = weakref.WeakSet(x.untyped_storage() for x in chain(model.parameters(), model.buffers()))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _OPAQUE:
            with self:
                return _OPAQUE[function](*args, **kwargs)
        result = function(*args, **kwargs)
        for storage in (x.untyped_storage() for x in tree_iter(result) if isinstance(x, torch.Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        self.count(function._overloadpacket, args, kwargs, result)
        return result

    def add(self, size: int) -> None:
        self.live += size
        self.most[self.phase] = max(self.most[self.phase], self.live)

    def enter(self, phase: str) -> None:
        self.phase, self.complete[phase] = phase, self.gradients

    def take(self, parameter: torch.nn.Parameter) -> None:
        self.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    def count(self, packet: Any, args: tuple, kwargs: dict, result: Any) -> None:
        kind, number = "matrices", 0
        if packet in _PRODUCTS:
            query, key = args[:2] if _PRODUCTS[packet] == 2 else args[1:3]
            kind, number = "attention", 2 * _PRODUCTS[packet] * query.numel() * key.shape[-2]
        elif packet in (aten.bmm, aten.baddbmm):  # eager attention; with one column, rotary angles: no matrix product
            kind, number = "attention", 2 * args[-2].numel() * args[-1].shape[-1] * (args[-2].shape[-1] > 1)
        elif packet in (aten._grouped_mm, aten.addmm_):
            a, b = args[:2] if packet is aten._grouped_mm else args[1:3]
            number = 2 * a.numel() * b.shape[-1]
        elif packet in flop_registry:
            number = flop_registry[packet](*args, **kwargs, out_val=result)
        self.operations[self.phase if self.phase in ("forward", "loss") else "backward", kind] += number

    def follow(self, name: str, layer: torch.nn.Module, inputs: tuple, output: Any) -> None:
        """Forward hook of a decoder layer: its backward pass begins when the gradient of its output is there."""
        marks = {name: output[0] if isinstance(output, tuple) else output}
        if name == "first" and inputs:
            marks["embedding"] = inputs[0]
        for phase, hidden in marks.items():
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient, phase=phase: self.enter(phase))


# ------------------------------------------------------------------------------------------------- a GPU's kernels


class FusedKernel(torch.autograd.Function):
    """One of Liger's, which saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def fuse(model: torch.nn.Module) -> None:
    """Norms and gated MLPs as Liger computes them."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: FusedKernel.apply(x, norm.weight)
        elif hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            module.forward = lambda x, mlp=module: mlp.down_proj(FusedKernel.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def gpu_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """SDPA's choice on CUDA: the flash kernel, or with a mask or in fp32 the memory-efficient one."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask is not None:  # becomes an additive bias, in every layer anew
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, dropout_p, is_causal)[0]


def gpu_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Its mask is of bytes; the CPU's has the dtype of `x`."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def gpu_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, options: Any, **kwargs: Any) -> Any:
    """CUDA needs no fp32 copies of a bf16 head. Of its logits in fp32 and again in bf16 there are three times the bytes of
    bf16 alone, so three chunks at a time take as much."""
    if hidden.dtype == torch.bfloat16:
        size = 3 * options.batch_chunk_size
        options = replace(options, batch_chunk_size=size, acc_policy="compact", acc_dtype=torch.bfloat16)
    return _loss(hidden, weight, target, options=options, **kwargs)


_loss = F.linear_cross_entropy
_GPU = {"scaled_dot_product_attention": gpu_attention, "dropout": gpu_dropout, "linear_cross_entropy": gpu_loss}

# --------------------------------------------------------------------------------------------------- model and pass


def read_shortened(config: str, depth: int | None = None) -> PretrainedConfig:
    """A configuration from its JSON, with so many decoder layers."""
    values = json.loads(config)
    whole = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    text = whole.get_text_config()
    layers = text.num_hidden_layers
    if depth is not None:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == layers:  # what each layer is
                setattr(text, name, value[:depth])
        text.num_hidden_layers = depth
    return whole


def build(config: PretrainedConfig, settings: dict[str, Any]) -> torch.nn.Module:
    """The model on the meta device, as the stage's ranks load and adapt it."""
    lora, trained = settings["lora"] and LoraSettings(**settings["lora"]), DTYPES[settings["trained_dtype"]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES[settings["dtype"]] if lora else trained,
            # FlashAttention keeps what SDPA without a mask keeps, and may not be installed here.
            attn_implementation="eager" if settings["attention"] == "eager" else "sdpa",
            trust_remote_code=False,
        )
        if lora:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, lora_config(lora))
            except ValueError as error:
                message = f"lora.target_modules {lora.target_modules!r} does not fit the model: {error}"
                raise UserError(message) from None
            for parameter in model.parameters():  # on the meta device PEFT leaves adapters in fp32
                parameter.data = parameter.data.to(trained) if parameter.requires_grad else parameter.data
    return model.train()


def one_pass(model: torch.nn.Module, settings: dict[str, Any], rows: int) -> Meter:
    """One forward and backward pass of a model that `build` returned, metered."""
    shape = (rows * settings["sequences"], settings["length"])
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device="cpu")
        unwrap(model).tie_weights()
        if settings["fused"]:
            fuse(model)
        if settings["checkpointing"]:  # to save the state of random numbers would be to ask a real GPU for it
            unwrap(model).activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        meter = Meter(model)
        layers = decoder_layers(model)
        names = ["first", *["middle"] * (len(layers) - 2), "last"][-len(layers) :]
        for layer, name in zip(layers, names, strict=True):
            layer.register_forward_hook(partial(meter.follow, name))
        for parameter in trained_parameters(model):
            parameter.register_post_accumulate_grad_hook(meter.take)
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        if settings["masked"]:
            inputs["position_ids"] = torch.arange(shape[1]).expand(shape)
        else:  # without data every row would be taken for a packed one
            stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None))
        if settings["on_gpu"]:
            stack.enter_context(patch.multiple(F, **_GPU))
        targets = torch.zeros(round(shape[0] * shape[1] * settings["targets"]), dtype=torch.long)
        reduction = "none" if settings["sequences"] == 2 else "sum"  # as a pair's answers are scored one by one

        def loss(hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
            meter.enter("loss")
            return token_losses(hidden.flatten(0, 1)[targets], head, targets, reduction).sum()

        autocast = settings["dtype"] == "bfloat16" and settings["trained_dtype"] == "float32"
        stack.enter_context(meter)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = forward_through_head(model, inputs, loss)
        total.backward()
    return meter


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def trained_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def costs_of(settings: dict[str, Any], depth: int, rows: int) -> dict[str, int]:
    """Of one pass with so many decoder layers.

    Bytes: "forward" and so on, the most of each phase beside weights and complete gradients, and
    "gradients before last" and so on, those complete when it begins. Operations: "forward matrices", "forward attention",
    "backward matrices", "backward attention", "loss matrices" (forward and backward). The rest: elements.
    """
    model = build(read_shortened(settings["config"], depth), settings)
    meter, head = one_pass(model, settings, rows), model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = [module.weight.numel() for name, module in modules if module is not head and "lora_" not in name]
    costs = {
        "parameters": count(model.parameters()),
        "trainable": count(trained_parameters(model)),
        "trainable of a layer": count(trained_parameters(decoder_layers(model)[-1])),
        "linear": sum(linear),
        "largest linear": max(linear, default=0),
        "largest": max(parameter.numel() for parameter in model.parameters()),
        "head": head.weight.numel(),
        "hidden": model.config.get_text_config().hidden_size,
    }
    for phase in PHASES:
        costs |= {phase: meter.most[phase], f"gradients before {phase}": meter.complete[phase]}
    parts = product(("forward", "loss", "backward"), ("matrices", "attention"))
    return costs | {f"{part} {kind}": meter.operations[part, kind] for part, kind in parts}


def measure(request: dict[str, Any]) -> dict[str, list[float]]:
    """`costs_of` all layers: [what does not depend on rows, what each row adds]. `request["rows"]`: the fewest to run."""
    whole, rows = read_shortened(request["config"]), request["rows"]
    layers = whole.get_text_config().num_hidden_layers
    size = count(build(whole, request | {"lora": None}).parameters())
    few, more = (costs_of(request, depth, rows) for depth in (2, 3))
    base = [costs["parameters"] - costs["trainable"] * bool(request["lora"]) for costs in (few, more)]
    if base[0] + (layers - 2) * (base[1] - base[0]) == size:
        pairs = (few, more), (costs_of(request, 2, 2 * rows), costs_of(request, 3, 2 * rows))
        once, twice = ({name: a[name] + (layers - 2) * (b[name] - a[name]) for name in a} for a, b in pairs)
    else:  # layers that differ: only all of them tell what they cost
        once, twice = (costs_of(request, layers, number) for number in (rows, 2 * rows))
    slopes = {name: (twice[name] - once[name]) / rows for name in once}
    return {name: [once[name] - slopes[name] * rows, slopes[name]] for name in once}
