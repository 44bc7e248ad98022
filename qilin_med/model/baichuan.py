"""Baichuan-7B as published, turned once into a native Llama folder that every tool loads without remote code.

The published modelling code (baichuan-inc/Baichuan-7B, modeling_baichuan.py) is Llama but for storage: W_pack holds the
rows of Q, K and V, in this order. Nothing is permuted, and lm_head stays as it is (Baichuan 2 alone normalises it).
"""

import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from qilin_med.artifact import disk_errors_explained, publish_folder
from qilin_med.console.progress import progress
from qilin_med.errors import UserError
from qilin_med.model.tokenizer import fast_tokenizer_from_sentencepiece

TOKENIZER = "tokenizer.model"
PACKED = "self_attn.W_pack.weight"
UNPACKED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
DERIVED = "rotary_emb.inv_freq"  # follows from rope_theta
LAYOUTS = ("pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json", "model.safetensors.index.json")
SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
KEPT_KEYS = (
    *SHAPE_KEYS,
    *("hidden_act", "initializer_range", "max_position_embeddings", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)

Weights = dict[str, torch.Tensor]


def convert_baichuan(
    source: Path,
    target: Path,
    chat_template: str,
    max_shard_size: int = 5 * 10**9,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the Llama folder `target` from the published folder `source`; returns {parameters, shards, dtype, target}.

    Source weights are mapped, not read, so memory holds about one shard. `target` appears only when it is whole.
    """
    source, target = Path(source), Path(target)
    config = read_llama_config(source)
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder, or remove it first")
    files = find_weight_files(source)
    check_disk(files, target)
    weights = read_llama_weights(files, report)
    check_weights(weights, config, source)
    config.dtype = weights["model.embed_tokens.weight"].dtype
    with folder_in_the_making(target) as folder:
        write_settings(folder, config, source, chat_template)
        shards = write_shards(folder, weights, max_shard_size, report)
    parameters = sum(tensor.numel() for tensor in weights.values())
    dtype = str(config.dtype).removeprefix("torch.")
    return {"parameters": parameters, "shards": shards, "dtype": dtype, "target": str(target)}


# What the source must be


def read_llama_config(source: Path) -> LlamaConfig:
    """The Llama configuration of a published Baichuan-7B folder; other models are refused with the reason."""
    for name in ("config.json", TOKENIZER):
        if not (source / name).is_file():
            raise UserError(f"{source}: {name} is missing; expected the folder of Baichuan-7B as it was published")
    try:
        published = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{source / 'config.json'} is not JSON; fetch it again") from None
    if reason := other_model(published):
        raise UserError(f"{source}: {reason}")
    if missing := [key for key in KEPT_KEYS if key not in published]:
        raise UserError(f"{source / 'config.json'} lacks {missing[0]}; expected the config of Baichuan-7B")
    return LlamaConfig(
        **{key: published[key] for key in KEPT_KEYS},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )


def other_model(published: dict[str, Any]) -> str | None:
    """Why this is not Baichuan-7B, or None."""
    kind = published.get("model_type")
    if kind == "llama":
        return "already a Llama folder; use it directly"
    if kind != "baichuan":
        return f"model_type is {kind!r}; only Baichuan-7B (model_type 'baichuan') is converted"
    if published.get("vocab_size") == 125696 or "z_loss_weight" in published:
        return "this is Baichuan 2 (vocabulary 125696, normalised lm_head), which Llama cannot express; use Baichuan-7B"
    # Baichuan-13B's config has no max_position_embeddings: ALiBi takes the place of rotary positions.
    large = published.get("hidden_size") == 5120 or published.get("num_hidden_layers") == 40
    if large or ("max_position_embeddings" not in published and "model_max_length" in published):
        return "this is Baichuan-13B (ALiBi, no rotary positions), which Llama cannot express; use Baichuan-7B"
    if published.get("tie_word_embeddings"):
        return "tie_word_embeddings is true; Baichuan-7B has an lm_head of its own"
    return None


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


def check_disk(files: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(file.stat().st_size for file in files) + 50 * 10**6  # the tokenizer and some air
    if (free := shutil.disk_usage(target.parent).free) < needed:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; make room there"
        )


# Reading


def read_llama_weights(files: list[Path], report: Callable[[str], None]) -> Weights:
    """All weights under their Llama names, as views of the mapped files."""
    weights: Weights = {}
    for number, file in enumerate(files, start=1):
        report(f"reading {file.name} ({number}/{len(files)})")
        for name, tensor in open_weights(file).items():
            for llama_name, part in unpack(name, tensor):
                if llama_name in weights:
                    raise UserError(f"{file}: {name} was in an earlier file already; expected every weight once")
                weights[llama_name] = part
    return weights


def open_weights(file: Path) -> Weights:
    """{name: tensor} of one published file, mapped; a pickle may hold tensors and nothing else."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        check_archive(file)
        weights = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} holds more than tensors (its pickle would run code); fetch the published file"
        ) from None
    except (zipfile.BadZipFile, RuntimeError, SafetensorError, EOFError, OSError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file} cannot be read ({why}); truncated or damaged, fetch it again") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{file} is no table of tensors; expected the weights of Baichuan-7B")
    return weights


def check_archive(file: Path) -> None:
    """torch maps a .bin without looking at its checksums, so damage within would become weights."""
    with zipfile.ZipFile(file) as archive, progress(f"checking {file.name}", file.stat().st_size, "B") as advance:
        for member in archive.infolist():
            try:
                with archive.open(member) as stream:
                    while part := stream.read(2**20):
                        advance(len(part))
            except zipfile.BadZipFile:
                raise zipfile.BadZipFile(f"checksum of {member.filename} differs") from None


def unpack(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A published weight under its Llama names. W_pack [3 x hidden, hidden] -> three of [hidden, hidden]."""
    if name.endswith(DERIVED):
        return
    if not name.endswith(PACKED):
        yield name, tensor
        return
    if tensor.shape[0] % 3:
        raise UserError(f"{name} has shape {list(tensor.shape)}; expected rows of Q, K and V, a multiple of three")
    for part, rows in zip(UNPACKED, tensor.chunk(3), strict=True):
        yield name.removesuffix(PACKED) + part, rows


def check_weights(weights: Weights, config: LlamaConfig, source: Path) -> None:
    """Every weight of the Llama model, in its shape, and no other."""
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


# Writing


@contextmanager
def folder_in_the_making(target: Path) -> Iterator[Path]:
    """A sibling under another name that is sealed and becomes `target` at the end, or vanishes where the work fails."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with disk_errors_explained(target):
            yield folder
            folder.chmod(0o755)  # mkdtemp keeps others out
            publish_folder(folder, target, {"stage": "base"})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_settings(folder: Path, config: LlamaConfig, source: Path, chat_template: str) -> None:
    tokenizer = fast_tokenizer_from_sentencepiece(source / TOKENIZER, chat_template, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise UserError(f"{source}: {TOKENIZER} has {len(tokenizer)} pieces, config.json says {config.vocab_size}")
    tokenizer.save_pretrained(folder)
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(folder)
    tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(folder)


def write_shards(folder: Path, weights: Weights, max_shard_size: int, report: Callable[[str], None]) -> int:
    """Safetensors in the layout of `save_pretrained`; returns how many shards there are."""
    plan = split_torch_state_dict_into_shards(stand_ins(weights), max_shard_size=max_shard_size)
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), start=1):
        with progress(f"writing {file}"):
            save_file({name: alone(weights[name]) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file keeps others out
        report(f"wrote {file} ({number}/{len(plan.filename_to_tensors)})")
    if plan.is_sharded:
        write_index(folder, plan)
    return len(plan.filename_to_tensors)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a storage of its own: Q, K and V lie in one, which safetensors does not write."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def stand_ins(weights: Weights) -> Weights:
    """The same names, shapes and types without memory: else the planner takes Q, K and V, in one storage, for one."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}


def write_index(folder: Path, plan: StateDictSplit) -> None:
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
