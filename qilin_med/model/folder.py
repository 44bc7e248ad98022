"""Whether a model folder can be loaded whole, trained and scored: checked without reading its weights."""

import contextlib
import json
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qilin_med.artifact import MANIFEST, check_sizes
from qilin_med.config.experiment import LoraSettings
from qilin_med.errors import UserError, in_one_line
from qilin_med.model.load import load_tokenizer, lora_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_model_folder(folder: Path) -> PreTrainedModel:
    """The model of a folder on the meta device, in fp32.

    UserError unless the folder holds a causal language model that transformers loads whole, without code of the model's
    own, whose losses can be computed in its output head, and a fast tokenizer that fits it. Weights are not read: their
    names and shapes are.
    """
    if (folder / "adapter_config.json").is_file() or (folder / "trainer_state.json").is_file():
        raise UserError(
            f"{folder}: a training checkpoint or adapter, not a whole model; use its stage's merged/ folder"
        )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            hint = " (Baichuan-7B as published: run scripts/convert_baichuan.py first)" if "tokenizer" in name else ""
            raise UserError(f"{folder}: {name} is missing; expected a complete Hugging Face folder{hint}")
    if (folder / MANIFEST).is_file():
        check_sizes(folder)
    _check_contents(folder)
    model = _build_without_weights(folder)
    ids, known = load_tokenizer(folder, "own").get_vocab(), model.get_input_embeddings().weight.shape[0]
    last = max(ids, key=ids.get)
    if ids[last] >= known:
        raise UserError(
            f"{folder}: the tokenizer's {last!r} has id {ids[last]}, but the model knows {known} ids (vocab_size); use the"
            " tokenizer that belongs to the model"
        )
    _check_logits(model, folder)
    return model


def _check_contents(folder: Path) -> None:
    """UserError unless every .json file is JSON, config.json names a causal language model of transformers, and the
    safetensors files are whole."""
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
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if INDEX not in contents:
            raise UserError(
                f"{folder}: no .safetensors weights; pickled .bin weights are not loaded, convert them first"
            )
        try:
            files = sorted(set(map(str, contents[INDEX]["weight_map"].values())))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: no list of weights (weight_map); get the file again") from None
    tensors = sum(_count_tensors(folder / name, folder) for name in files)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(layers, int) and layers > tensors:  # a million of them would take hours to build
        raise UserError(f"{folder}: config.json says {layers:,} layers, but the weights are {tensors:,} tensors")


def _count_tensors(path: Path, folder: Path) -> int:
    if path.parent != folder or not path.is_file():
        raise UserError(f"{path}: missing, though {INDEX} lists it; get the folder again")
    try:
        with safe_open(path, "pt") as file:
            return len(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut off ({in_one_line(error)}); get the file again") from None


def _build_without_weights(folder: Path) -> PreTrainedModel:
    """UserError unless weights and config.json agree on every name and shape. The library's own loader compares them."""
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
        *(f"{name} has shape {list(here)}, by config.json {list(there)}" for name, here, there in report["mismatched_keys"]),
        *(f"{name} is missing" for name in report["missing_keys"]),
        *(f"{name} has no place in the model of config.json" for name in report["unexpected_keys"]),
    ]  # fmt: skip
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise UserError(
            f"{folder}: weights and config.json do not belong together: {min(problems)}{more}; get the folder again"
        )
    return model


def _check_logits(model: PreTrainedModel, folder: Path) -> None:
    """UserError if a meta model's logits are not what its head returns. Losses and log-probabilities are computed in place of
    the head's output, so they would miss whatever follows it."""
    returned, logits = [], []
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: returned.append(call[-1]))
    # The meta device has no values: models with layers that depend on them go unchecked.
    with torch.no_grad(), torch.device("meta"), contextlib.suppress(RuntimeError, ValueError):
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 1, 2, 2)}
        logits.append(model(**inputs, use_cache=False).logits)
    hook.remove()
    if logits and logits[0] is not returned[0]:
        raise UserError(
            f"{folder}: {model.config.model_type} scales or caps its logits behind the output head, which is not"
            " supported; use a model that does not (Llama, Qwen, Mistral, GLM)"
        )


def count_parameters(model: PreTrainedModel, lora: LoraSettings | None) -> tuple[int, int]:
    """(all, trainable) parameters of a meta model in a stage; UserError if the stage's adapter does not fit it."""
    if lora:
        from peft import get_peft_model

        folder = model.config.name_or_path
        try:
            model = get_peft_model(deepcopy(model), lora_config(lora))
        except ValueError as error:
            raise UserError(f"lora.target_modules = {lora.target_modules!r} does not fit {folder}: {error}") from None
        if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
            raise UserError(
                f"lora.target_modules = {lora.target_modules!r} covers the output head, whose own weight the losses are"
                " computed from, without an adapter; leave it out"
            )
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def max_positions(folder: Path) -> int | None:
    """The longest sequence in tokens that the model has positions for; None if its configuration names no limit."""
    return getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
