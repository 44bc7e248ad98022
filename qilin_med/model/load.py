"""Tokenizers and models: load, adapt, merge."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import apply_liger_kernel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from qilin_med.config.experiment import LoraSettings, ModelConfig, StageConfig, StageName
from qilin_med.errors import UserError, in_one_line
from qilin_med.prompt.template import QILIN_TEMPLATE

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel  # peft is imported where it is used: it takes seconds

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_tokenizer(folder: Path, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder with the experiment's chat template in it, padding on the right."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="right")
    except Exception as error:
        # The library advises running the folder's own code, which we never do.
        why = "it needs code of its own" if "remote_code" in str(error) else in_one_line(error)
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({why}); get tokenizer.json again") from None
    if template == "qilin":
        tokenizer.chat_template = QILIN_TEMPLATE
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so any id will do
    return tokenizer


def load_model(folder: Path, settings: ModelConfig, dtype: torch.dtype, **extra: Any) -> PreTrainedModel:
    """The model of a folder, without a cache, since rows are packed, and never with code of its own."""
    check_packages(settings)
    safe = {"trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=settings.attention, **safe, **extra
    )
    model.config.use_cache = False
    return model


def load_for_inference(folder: Path, settings: ModelConfig, device: str) -> PreTrainedModel:
    """The model of a folder that `check_model_folder` has seen, in the experiment's number format, in evaluation mode."""
    if settings.attention == "flash_attention_2":
        # The choices of a question are branches of one row (lm.py), which takes a mask; FlashAttention has none.
        settings = settings.model_copy(update={"attention": "sdpa"})
    return load_model(folder, settings, DTYPES[settings.dtype]).to(device).eval()


def attention_path(settings: ModelConfig, apart: bool) -> str:
    """The attention kernel of training, in words. `apart`: rows hold several sequences that must not see each other."""
    if settings.attention == "flash_attention_2":
        return "flash_attention_2, variable-length kernel (sequences apart by cumulative lengths)"
    if settings.attention == "eager":
        return f"eager, {'block-diagonal' if apart else 'causal'} mask, all scores in memory"
    if apart:
        return "sdpa, memory-efficient kernel with a block-diagonal mask (plain causal where every row is one sequence)"
    return "sdpa, plain causal without a mask (on a GPU the flash kernel)"


def check_packages(settings: ModelConfig, training: bool = False) -> None:
    """UserError if a setting needs a package that is not installed."""
    wanted = (
        (settings.attention == "flash_attention_2", "flash-attn", "model.attention to 'sdpa'"),
        (settings.fused_kernels and training, "liger-kernel", "model.fused_kernels to false"),
    )
    for is_wanted, package, otherwise in wanted:
        if is_wanted and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(
                f"the package {package} is not installed: .venv/bin/pip install -r requirements-gpu.txt --no-build-isolation"
                f" (the version that fits), or set {otherwise}"
            )


def check_trackers(stage: StageName, names: list[str]) -> None:
    """UserError if a tracker is unknown to transformers or its package is not installed."""
    # transformers' list of what is installed never names Flyte, which runs inside Flyte's own tasks.
    for name in (name for name in names if name not in ("all", "none", "flyte")):
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"{stage}.report_to names '{name}', which transformers does not know; it knows"
                f" {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name not in get_available_reporting_integrations():
            raise UserError(
                f"{stage}.report_to names '{name}', which is not installed: pip install {name.replace('_', '-')}, or take it"
                " out of report_to"
            )


def load_for_training(folder: Path, settings: ModelConfig, section: StageConfig) -> PreTrainedModel:
    """A stage's parent as its ranks train it, in the precision, storage and kernels of the settings."""
    lora = section.lora
    # If all parameters train, the optimiser needs them in fp32: DeepSpeed keeps its own copy, plain PyTorch does not.
    dtype = DTYPES[settings.dtype] if lora or section.deepspeed else torch.float32
    quantization = {}
    if lora and lora.quantization:  # QLoRA (Dettmers et al. 2023): NF4 with double quantisation, arithmetic in `dtype`
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = {"quantization_config": BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)}
    model = load_model(folder, settings, dtype, **quantization)
    if settings.fused_kernels:
        # The loss stays ours, which never builds the full logits either.
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    return model


def add_adapter(model: PreTrainedModel, section: StageConfig, seed: int) -> "PeftModel":
    """The model with the stage's LoRA adapter, initialised from the seed."""
    from peft import get_peft_model

    set_seed(seed)  # the same on every rank
    # DeepSpeed needs a single precision and keeps fp32 copies itself. Without it, PEFT makes the adapter fp32.
    return get_peft_model(model, lora_config(section.lora), autocast_adapter_dtype=not section.deepspeed)


def lora_config(settings: LoraSettings) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )  # fmt: skip


def load_checkpoint(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a training checkpoint; UserError if it does not hold every weight in its shape."""
    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if wrong := {key: names for key, names in report.items() if names}:
        raise UserError(f"{checkpoint}: not a whole model ({wrong}); it cannot be published")
    return model


def merge_adapter(parent: Path, adapter: Path) -> PreTrainedModel:
    """The parent with the adapter merged in, in fp32: a merge in bf16 changes 1-2% of the predicted tokens.

    So is an adapter that was trained on 4-bit weights: a merged folder never holds rounded ones.
    """
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, trust_remote_code=False)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def save_whole_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str, end_ids: set[int]
) -> None:
    """Write model and tokenizer as one complete Hugging Face folder, in which generation ends at any of `end_ids`.

    UserError if any weight is not finite.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"{name} of the trained model is not finite: not published. Lower the learning rate")
    model.to(DTYPES[dtype])
    model.config.use_cache = True  # off in training only; generation without it is many times slower
    model.generation_config.eos_token_id = sorted(end_ids) if len(end_ids) > 1 else min(end_ids)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
