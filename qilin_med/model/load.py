"""Tokenizers and models: load, adapt, merge."""

import contextlib
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import apply_liger_kernel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from qilin_med.artifact import MANIFEST, check_sizes
from qilin_med.config.experiment import LoraSettings, ModelConfig, StageConfig, StageName
from qilin_med.errors import UserError, in_one_line
from qilin_med.model.batches import model_inputs
from qilin_med.model.losses import sequence_log_probs
from qilin_med.prompt.template import QILIN_TEMPLATE

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel  # peft is imported where it is used: it takes seconds

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def check_model_folder(folder: Path) -> None:
    """UserError unless the folder holds a causal language model that transformers loads whole, without code of the model's
    own, and a fast tokenizer that fits it. Weights are not read: their names and shapes are."""
    if (folder / "adapter_config.json").is_file() or (folder / "trainer_state.json").is_file():
        raise UserError(
            f"{folder}: a training checkpoint or adapter, not a whole model; use its stage's merged/ folder"
        )
    for name in ("config.json", *TOKENIZER_FILES):
        if not (folder / name).is_file():
            hint = " (Baichuan-7B as published: run scripts/convert_baichuan.py first)" if "tokenizer" in name else ""
            raise UserError(f"{folder}: {name} is missing; expected a complete Hugging Face folder{hint}")
    if (folder / MANIFEST).is_file():
        check_sizes(folder)
    config, tensors = _read_config(folder), _list_tensors(folder)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(layers, int) and layers > len(tensors):  # a million of them would take hours to build
        raise UserError(f"{folder}: config.json says {layers:,} layers, but the weights are {len(tensors):,} tensors")
    known = _check_weights(folder)
    ids = load_tokenizer(folder, "own").get_vocab()
    last = max(ids, key=ids.get)
    if ids[last] >= known:
        raise UserError(
            f"{folder}: the tokenizer's {last!r} has id {ids[last]}, but the model knows {known} ids (vocab_size); use the"
            " tokenizer that belongs to the model"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json; UserError if it names no causal language model of transformers, or any .json file is no JSON."""
    contents = {}
    for path in sorted(folder.glob("*.json")):
        try:
            contents[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({in_one_line(error)}); get the file again") from None
    config = contents["config.json"]
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{folder / 'config.json'}: names no model_type; expected a Hugging Face configuration")
    if kind not in CONFIG_MAPPING:
        own = ", which comes with code of its own; such code is never run here" if "auto_map" in config else ""
        raise UserError(
            f"{folder}: transformers does not know the model type '{kind}'{own}; convert the model to a type that it knows"
            " (Baichuan-7B: scripts/convert_baichuan.py)"
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{folder}: model type '{kind}' is not a causal language model of transformers")
    return config


def _list_tensors(folder: Path) -> set[str]:
    """Names in the headers of the safetensors files; UserError if one is missing, damaged or cut off."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file():
        files = _shards(index)
    tensors = set()
    for path in (folder / name for name in sorted(files)):
        if path.parent != folder or not path.is_file():
            raise UserError(f"{path}: missing, though {index.name} lists it; get the folder again")
        try:
            with safe_open(path, "pt") as file:
                tensors.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or cut off ({in_one_line(error)}); get the file again") from None
    return tensors


def _shards(index: Path) -> set[str]:
    try:
        return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        raise UserError(
            f"{index.parent}: no .safetensors weights; pickled .bin weights are not loaded, convert them first"
        ) from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: no list of weights (weight_map); get the file again") from None


def _check_weights(folder: Path) -> int:
    """UserError unless weights and config.json agree on every name and shape; returns the number of token ids.

    The library's own loader compares them, without room for the weights.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise UserError(
            f"{folder}: no model can be built from config.json ({in_one_line(error)}); correct it, or get the folder again"
        ) from None
    problems = [
        *(
            f"{name} has shape {list(found)}, by config.json {list(said)}"
            for name, found, said in report["mismatched_keys"]
        ),
        *(f"{name} is missing" for name in report["missing_keys"]),
        *(f"{name} has no place in the model of config.json" for name in report["unexpected_keys"]),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise UserError(
            f"{folder}: weights and config.json do not belong together: {min(problems)}{more}; get the folder again"
        )
    return model.get_input_embeddings().weight.shape[0]


def max_positions(folder: Path) -> int | None:
    """Tokens that the model's positions reach, None where its configuration names no limit."""
    return getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)


def load_tokenizer(folder: Path, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder with the experiment's chat template in it, padding on the right."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="right")
    except Exception as error:
        # The library advises to run the folder's own code; we never do.
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
    """The model of a folder, without a cache (rows are packed) and never with remote code."""
    check_packages(settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=settings.attention,
        trust_remote_code=False,
        use_safetensors=True,
        **extra,
    )
    model.config.use_cache = False
    return model


def load_for_inference(folder: Path, settings: ModelConfig, device: str) -> PreTrainedModel:
    """The model in the experiment's number format on `device`, in evaluation mode."""
    if settings.attention == "flash_attention_2":
        # The choices of a question are branches of one row (lm.py), which takes a mask; FlashAttention has none.
        settings = settings.model_copy(update={"attention": "sdpa"})
    _check_logits(_build_without_weights(folder), folder)
    return load_model(folder, settings, DTYPES[settings.dtype]).to(device).eval()


def attention_path(settings: ModelConfig, apart: bool) -> str:
    """Which kernel training's attention takes; `apart`: rows hold several sequences that must not see each other."""
    if settings.attention == "flash_attention_2":
        return "flash_attention_2, variable-length kernel (sequences apart by cumulative lengths)"
    if settings.attention == "eager":
        return f"eager, {'block-diagonal' if apart else 'causal'} mask, all scores in memory"
    if apart:
        return "sdpa, memory-efficient kernel with a block-diagonal mask (plain causal where every row is one sequence)"
    return "sdpa, plain causal without a mask (on a GPU the flash kernel)"


def check_packages(settings: ModelConfig, training: bool = False) -> None:
    """UserError if a setting needs a package that is not installed."""
    wanted = []
    if settings.attention == "flash_attention_2":
        wanted.append(("flash-attn", "model.attention to 'sdpa'"))
    if settings.fused_kernels and training:
        wanted.append(("liger-kernel", "model.fused_kernels to false"))
    for package, otherwise in wanted:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
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
    """A stage's parent as its ranks train it: precision, 4-bit storage and kernels as the settings say."""
    lora = section.lora
    # Where all parameters train, the optimiser needs fp32 ones: DeepSpeed keeps a copy of its own, plain PyTorch none.
    dtype = DTYPES[settings.dtype] if lora or section.deepspeed else torch.float32
    quantization = {"quantization_config": _nf4(dtype)} if lora and lora.quantization else {}
    model = load_model(folder, settings, dtype, **quantization)
    if settings.fused_kernels:
        # The loss stays ours, which never builds the full logits either.
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    return model


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA (Dettmers et al. 2023): NF4 with double quantisation, arithmetic in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_adapter(model: PreTrainedModel, section: StageConfig, seed: int) -> "PeftModel":
    """The model with the stage's LoRA adapter, its start drawn from the seed."""
    from peft import get_peft_model

    set_seed(seed)  # the same on every rank
    # DeepSpeed wants one precision and keeps fp32 copies itself; without it PEFT makes the adapter fp32.
    return get_peft_model(model, lora_config(section.lora), autocast_adapter_dtype=not section.deepspeed)


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
    """(all, trainable) parameters of a stage's model, counted on the meta device: no weights are read.

    UserError if the model or the adapter is one whose losses we would compute wrongly.
    """
    model = _build_without_weights(folder)
    _check_logits(model, folder)
    if lora:
        from peft import get_peft_model

        try:
            model = get_peft_model(model, lora_config(lora))
        except ValueError as error:
            raise UserError(f"lora.target_modules = {lora.target_modules!r} does not fit {folder}: {error}") from None
        if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
            raise UserError(
                f"lora.target_modules = {lora.target_modules!r} covers the output head, whose own weight the losses are"
                " computed from, without an adapter; leave it out"
            )
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def _build_without_weights(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _check_logits(model: PreTrainedModel, folder: Path) -> None:
    """UserError if a meta model's logits are not what its head returns: our losses and likelihoods are computed in the head's
    place, and would miss what comes after it."""
    returned, logits = [], []
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: returned.append(call[-1]))
    with (
        torch.no_grad(),
        torch.device("meta"),
        contextlib.suppress(RuntimeError, ValueError),
    ):  # of layers that want data
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 1, 2, 2)}
        logits.append(model(**inputs, use_cache=False).logits)
    hook.remove()
    if logits and logits[0] is not returned[0]:
        raise UserError(
            f"{folder}: {model.config.model_type} scales or caps its logits behind the output head, which is not"
            " supported; use a model that does not (Llama, Qwen, Mistral, GLM)"
        )


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside DeepSpeed, DDP and PEFT wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


HeadFunction = Callable[[torch.Tensor, torch.nn.Linear], torch.Tensor]


def forward_through_head(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], compute: HeadFunction
) -> torch.Tensor:
    """One forward pass in which the output head returns compute(hidden [B, T, H], head) in place of logits.

    So the full logits never exist, and what reads the head's weight runs inside the head's own call, where ZeRO-3
    gathers that weight, in the backward pass too.
    """
    head = unwrap(model).get_output_embeddings()

    def compute_in_weights_dtype(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return compute(hidden, head)

    head.forward = compute_in_weights_dtype
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        del head.forward  # the class's own again


def pair_log_probs(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(answer | prompt) of the chosen and of the rejected answers of a `PairCollator`'s batch: [pairs] each."""
    pairs = len(batch["rows"])
    score = partial(
        sequence_log_probs, labels=batch["labels"], sequence_index=batch["sequence_index"], sequences=2 * pairs
    )
    scores = forward_through_head(model, model_inputs(batch), score)
    return scores[:pairs], scores[pairs:]


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

    Also where the adapter trained on 4-bit weights: a folder that is handed on never holds rounded weights.
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
