"""Tokenizers and models: load, adapt, merge."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qilin_med.config import LoraSettings, ModelConfig
from qilin_med.errors import UserError
from qilin_med.template import QILIN_TEMPLATE

if TYPE_CHECKING:
    from peft import LoraConfig  # peft is imported where it is used: it takes seconds, and stage 1 does without

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def check_model_folder(folder: Path) -> None:
    """UserError unless the folder holds a loadable causal language model with a fast tokenizer."""
    if (folder / "adapter_config.json").is_file() or (folder / "trainer_state.json").is_file():
        raise UserError(
            f"{folder}: a training checkpoint or adapter, not a whole model; use its stage's merged/ folder"
        )
    for name in ("config.json", *TOKENIZER_FILES):
        if not (folder / name).is_file():
            hint = " (Baichuan-7B as published: run scripts/convert_baichuan.py first)" if "tokenizer" in name else ""
            raise UserError(f"{folder}: {name} is missing; expected a complete Hugging Face folder{hint}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors weights; pickled .bin weights are not loaded, convert them first")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{folder}: model type '{config.model_type}' is not a causal language model of transformers")


def max_positions(folder: Path) -> int | None:
    """Tokens that the model's positions reach, None where its configuration names no limit."""
    return getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)


def load_tokenizer(folder: Path, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder with the experiment's chat template in it, padding on the right."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="right")
    if template == "qilin":
        tokenizer.chat_template = QILIN_TEMPLATE
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so any id will do
    return tokenizer


def load_model(folder: Path, settings: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, without a cache (rows are packed) and never with remote code."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=settings.attention, trust_remote_code=False, use_safetensors=True
    )
    model.config.use_cache = False
    return model


def lora_config(settings: LoraSettings) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def count_parameters(folder: Path, lora: LoraSettings | None) -> tuple[int, int]:
    """(all, trainable) parameters of a stage's model, counted on the meta device: no weights are read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=False)
        if lora:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, lora_config(lora))
            except ValueError as error:
                raise UserError(
                    f"lora.target_modules = {lora.target_modules!r} does not fit {folder}: {error}"
                ) from None
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside DeepSpeed, DDP and PEFT wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def capture_hidden_states(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the decoder's last hidden states [B, T, H] of every forward pass inside the block.

    The pass goes through the outermost wrapper, as DeepSpeed and DDP need; the caller asks it for one position's logits
    (`logits_to_keep=1`) and computes the loss from the hidden states, so that the full logits never exist.
    """
    captured: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        captured.append(output.last_hidden_state)

    handle = unwrap(model).get_decoder().register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


def forward_hidden(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One forward pass up to the last hidden states [B, T, H]."""
    with capture_hidden_states(model) as captured:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return captured[-1]


def output_head(model: torch.nn.Module) -> torch.nn.Linear:
    return unwrap(model).get_output_embeddings()


def merge_adapter(parent: Path, adapter: Path) -> PreTrainedModel:
    """The parent with the adapter merged in, in fp32: a merge in bf16 changes 1-2% of the predicted tokens."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, trust_remote_code=False)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def save_whole_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str) -> None:
    """Write model and tokenizer as one complete Hugging Face folder; UserError if any weight is not finite."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{name} of the trained model is not finite: not published. Lower the learning rate")
    model.to(DTYPES[dtype])
    model.config.use_cache = True  # off in training only; generation without it is many times slower
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
