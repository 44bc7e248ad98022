"""Baichuan-7B as published, turned once into a native Llama folder that every tool loads without remote code.

The published modelling code (baichuan-inc/Baichuan-7B, modeling_baichuan.py) is Llama but for storage: W_pack holds the
rows of Q, K and V, in this order. Nothing is permuted, and lm_head stays as it is (Baichuan 2 alone normalises it).
"""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from qilin_med.artifact import Artifact, digest, hash_files
from qilin_med.console.progress import progress
from qilin_med.convert.tokenizer import fast_tokenizer_from_sentencepiece
from qilin_med.errors import UserError, in_one_line

TOKENIZER = "tokenizer.model"
PACKED = "self_attn.W_pack.weight"
UNPACKED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
DERIVED = "rotary_emb.inv_freq"  # follows from rope_theta
INDEX = "model.safetensors.index.json"
LAYOUTS = ("pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json", INDEX)
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEPT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
             "initializer_range", "max_position_embeddings", "rms_norm_eps", *TOKEN_KEYS)  # fmt: skip

Weights = dict[str, torch.Tensor]


def convert_baichuan(source: Path, target: Path, chat_template: str, max_shard_size: int = 5 * 10**9) -> dict[str, Any]:
    """Write the Llama folder `target` from the published folder `source`; returns the manifest of `target`, with the facts
    parameters, shards and dtype. A folder that was made from the same files is done already.

    Source weights are mapped, not read, so memory holds about one shard.
    """
    config = read_llama_config(source)
    files = find_weight_files(source)
    inputs = [source / "config.json", source / TOKENIZER, *files]
    hashes = dict(zip((path.name for path in inputs), hash_files(inputs, f"hashing {source}"), strict=True))
    artifact = Artifact(target, {"files": hashes, "template": digest(chat_template), "max_shard_size": max_shard_size})
    if manifest := artifact.finished(False, f"{target} exists already: name a new folder, or remove it first"):
        print(f"{target} was made from these files already")
        return manifest
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(file.stat().st_size for file in files) + 50 * 10**6  # the tokenizer and some air
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; make room there"
        )
    weights = read_llama_weights(files)
    check_weights(weights, config, source)
    config.dtype = weights["model.embed_tokens.weight"].dtype
    config.architectures = [LlamaForCausalLM.__name__]
    tokenizer = fast_tokenizer_from_sentencepiece(source / TOKENIZER, chat_template, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise UserError(f"{source}: {TOKENIZER} has {len(tokenizer)} pieces, config.json says {config.vocab_size}")
    with artifact.building() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        GenerationConfig(**{key: getattr(config, key) for key in TOKEN_KEYS}).save_pretrained(folder)
        shards = write_shards(folder, weights, max_shard_size)
        parameters = sum(tensor.numel() for tensor in weights.values())
        dtype = str(config.dtype).removeprefix("torch.")
        artifact.facts = {"stage": "base", "parameters": parameters, "shards": shards, "dtype": dtype}
    return artifact.facts


def read_llama_config(source: Path) -> LlamaConfig:
    """The Llama configuration of a published Baichuan-7B folder; UserError says why another model cannot be converted."""
    for name in ("config.json", TOKENIZER):
        if not (source / name).is_file():
            raise UserError(f"{source}: {name} is missing; expected the folder of Baichuan-7B as it was published")
    try:
        published = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{source / 'config.json'} is not JSON; fetch it again") from None
    kind = published.get("model_type")
    # Baichuan-13B's config has no max_position_embeddings: ALiBi takes the place of rotary positions.
    without_positions = "max_position_embeddings" not in published and "model_max_length" in published
    large = published.get("hidden_size") == 5120 or published.get("num_hidden_layers") == 40 or without_positions
    second = published.get("vocab_size") == 125696 or "z_loss_weight" in published
    use = "which Llama cannot express; use Baichuan-7B"
    reasons = [
        (kind == "llama", "already a Llama folder; use it directly"),
        (kind != "baichuan", f"model_type is {kind!r}; only Baichuan-7B (model_type 'baichuan') is converted"),
        (second, f"this is Baichuan 2 (vocabulary 125696, normalised lm_head), {use}"),
        (large, f"this is Baichuan-13B (ALiBi, no rotary positions), {use}"),
        (published.get("tie_word_embeddings"), "tie_word_embeddings is true; Baichuan-7B has an lm_head of its own"),
        *((key not in published, f"config.json lacks {key}; expected the config of Baichuan-7B") for key in KEPT_KEYS),
    ]
    for applies, reason in reasons:
        if applies:
            raise UserError(f"{source}: {reason}")
    return LlamaConfig(
        **{key: published[key] for key in KEPT_KEYS},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )


def find_weight_files(source: Path) -> list[Path]:
    """The files of the one published layout that the folder holds."""
    layout = next((source / name for name in LAYOUTS if (source / name).is_file()), None)
    if layout is None:
        raise UserError(f"{source}: no weights; expected one of {', '.join(LAYOUTS)}")
    if layout.suffix != ".json":
        return [layout]
    try:
        files = [source / name for name in sorted(set(json.loads(layout.read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{layout} is no weight index; fetch it again") from None
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though {layout.name} lists it; fetch it again")
    return files


def read_llama_weights(files: list[Path]) -> Weights:
    """All weights under their Llama names, as views of the mapped files. W_pack [3 x hidden, hidden] -> three of
    [hidden, hidden]."""
    weights: Weights = {}
    for number, file in enumerate(files, start=1):
        print(f"reading {file.name} ({number}/{len(files)})", flush=True)
        for name, tensor in open_weights(file).items():
            parts = {} if name.endswith(DERIVED) else {name: tensor}
            if name.endswith(PACKED):
                if tensor.shape[0] % 3:
                    raise UserError(f"{name} has shape {list(tensor.shape)}; expected Q, K and V, a multiple of 3 rows")
                names = (name.removesuffix(PACKED) + part for part in UNPACKED)
                parts = dict(zip(names, tensor.chunk(3), strict=True))
            if parts.keys() & weights.keys():
                raise UserError(f"{file}: {name} was in an earlier file already; expected every weight once")
            weights |= parts
    return weights


def open_weights(file: Path) -> Weights:
    """{name: tensor} of one published file, mapped; a pickle may hold tensors and nothing else."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        # torch maps a .bin without looking at its checksums, so damage within would become weights.
        with zipfile.ZipFile(file) as archive, progress(f"checking {file.name}", file.stat().st_size, "B") as advance:
            for member in archive.infolist():
                archive.read(member)
                advance(member.file_size)
        weights = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} holds more than tensors (its pickle would run code); fetch the published file"
        ) from None
    except (zipfile.BadZipFile, RuntimeError, SafetensorError, EOFError, OSError) as error:
        raise UserError(f"{file} cannot be read ({in_one_line(error)}); truncated or damaged, fetch it again") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{file} is no table of tensors; expected the weights of Baichuan-7B")
    return weights


def check_weights(weights: Weights, config: LlamaConfig, source: Path) -> None:
    """UserError unless every weight of the Llama model is there, in its shape, and no other."""
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if missing := sorted(expected.keys() - weights.keys()):
        raise UserError(f"{source}: {missing[0]} is missing ({len(missing)} in all); a shard or layer is not there")
    if extra := sorted(weights.keys() - expected.keys()):
        raise UserError(f"{source}: {extra[0]} is no weight of Baichuan-7B ({len(extra)} in all); another model?")
    for name, shape in expected.items():
        if list(weights[name].shape) != shape:
            raise UserError(f"{source}: {name} has shape {list(weights[name].shape)}; config.json calls for {shape}")
        if not weights[name].is_floating_point():
            raise UserError(f"{source}: {name} is {weights[name].dtype}, quantised; expected the published weights")


def write_shards(folder: Path, weights: Weights, max_shard_size: int) -> int:
    """Safetensors in the layout of `save_pretrained`; returns how many shards there are."""
    # Planned without memory: Q, K and V lie in one storage, which the library would take for one tensor.
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
        shard = {name: weights[name] for name in names}
        for name, tensor in shard.items():
            if tensor.untyped_storage().nbytes() > tensor.nbytes:  # safetensors wants a storage for each tensor
                shard[name] = tensor.clone()
        with progress(f"writing {file}"):
            save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file keeps others out
        print(f"wrote {file} ({number}/{len(plan.filename_to_tensors)})", flush=True)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)
