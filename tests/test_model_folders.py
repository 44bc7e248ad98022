"""Model folders that are broken, or want to run code of their own: one line each, at once, and never advice to trust them."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_model
from transformers import AutoModelForCausalLM

from qilin_med.artifact import MANIFEST, commit_folder, digest
from qilin_med.errors import UserError
from qilin_med.model.folder import check_model_folder

AUTO_MAP = {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, small_tokenizer) -> Path:
    """A published folder in shards, as a stage hands it over."""
    part = tmp_path_factory.mktemp("models") / "part"
    write_model(part, small_tokenizer, seed=0)
    shards = part.with_name("shards")
    AutoModelForCausalLM.from_pretrained(part).save_pretrained(shards, max_shard_size="40KB")
    small_tokenizer.save_pretrained(shards)
    commit_folder(shards, MANIFEST, {})
    return shards.rename(part.with_name("sound"))


def set_values(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        contents = json.loads((folder / name).read_text(encoding="utf-8")) | values
        (folder / name).write_text(json.dumps(contents), encoding="utf-8")

    return change


def set_config(**values: object) -> Callable[[Path], None]:
    return set_values("config.json", **values)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = {}
        for shard in folder.glob("*.safetensors"):
            weights |= load_file(shard)
            shard.unlink()
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def promise_more(folder: Path) -> None:
    """The header says a tensor of 2**40 bytes, of which the file has none."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
    first_shard(folder).write_bytes(len(header).to_bytes(8, "little") + header)


def pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def point_outside(folder: Path) -> None:
    contents = {"files": {"../secret": {"size": 3, "sha256": "0" * 64}}}
    (folder / MANIFEST).write_text(json.dumps({**contents, "digest": digest(contents)}))


def small_vocabulary(weights: dict[str, torch.Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:500].clone()


BROKEN: dict[str, tuple[str, list[Callable[[Path], object]]]] = {
    "code of its own": ("code of its own", [set_config(model_type="x", **AUTO_MAP)]),
    "unknown type": ("does not know the model type 'x'", [set_config(model_type="x")]),
    "no type": ("names no model_type", [set_config(model_type=None)]),
    "no causal model": ("'t5' is not a causal", [set_config(model_type="t5")]),
    "config no JSON": ("config.json: not JSON", [write("config.json", "{")]),
    "config a list": ("names no model_type", [write("config.json", "[]")]),
    "config nested": ("not JSON", [write("config.json", "[" * 100_000)]),
    "generation config no JSON": ("generation_config.json: not JSON", [write("generation_config.json", "{,}")]),
    "0 heads": ("no model can be built", [set_config(num_attention_heads=0, num_key_value_heads=0)]),
    "0 key-value heads": ("no model can be built", [set_config(num_key_value_heads=0)]),
    "heads that do not divide": ("not a multiple of the number of attention heads (3)", [set_config(num_attention_heads=3)]),
    "a width of another model": ("has shape [520, 32], by config.json [520, 64]", [set_config(hidden_size=64, head_dim=32)]),
    "a million layers": ("1,000,000 layers, but the weights are 21 tensors", [set_config(num_hidden_layers=10**6)]),
    "a layer too few": ("model.layers.1.input_layernorm.weight has no place", [set_config(num_hidden_layers=1)]),
    "a layer too many": ("model.layers.2.input_layernorm.weight is missing", [set_config(num_hidden_layers=3)]),
    "unknown activation": ("no model can be built", [set_config(hidden_act="x")]),
    "weights cut off": ("damaged or cut off", [lambda folder: os.truncate(first_shard(folder), 20_000)]),
    "header cut off": ("damaged or cut off", [lambda folder: os.truncate(first_shard(folder), 100)]),
    "empty weights": ("damaged or cut off", [lambda folder: os.truncate(first_shard(folder), 0)]),
    "header promises more": ("damaged or cut off", [promise_more]),
    "a shard missing": ("missing, though model.safetensors.index.json lists it", [lambda folder: first_shard(folder).unlink()]),
    "a shard outside": ("lists it", [write("model.safetensors.index.json", '{"weight_map": {"x": "../x.safetensors"}}')]),
    "index without weights": ("no list of weights", [write("model.safetensors.index.json", "[]")]),
    "a tensor missing": ("model.norm.weight is missing", [change_weights(lambda weights: weights.pop("model.norm.weight"))]),
    "a tensor of another shape": (
        "has shape [7], by config.json [32]",
        [change_weights(lambda weights: weights.update({"model.norm.weight": torch.zeros(7)}))],
    ),
    "pickled": ("pickled .bin weights are not loaded", [pickled]),
    "tokenizer cut off": ("tokenizer.json: not JSON", [lambda folder: os.truncate(folder / "tokenizer.json", 1000)]),
    "tokenizer of no kind": ("tokenizer cannot be loaded", [write("tokenizer.json", "{}")]),
    "tokenizer with code": (
        "tokenizer cannot be loaded",
        [
            set_values("tokenizer_config.json", tokenizer_class="XTokenizer", auto_map={"AutoTokenizer": ["x.X", None]}),
            write("tokenizer.json", "{}"),
        ],
    ),
    "fewer ids than tokens": (
        "has id 519, but the model knows 500 ids",
        [set_config(vocab_size=500), change_weights(small_vocabulary)],
    ),
}  # fmt: skip


def refuse(folder: Path, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        check_model_folder(folder)
    assert time.monotonic() - start < 10
    message = str(error.value)
    assert words in message and str(folder) in message
    assert "\n" not in message and len(message) < 500
    assert "trust" not in message and "remote_code" not in message


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_gets_one_line(sound, tmp_path, name):
    folder = shutil.copytree(sound, tmp_path / "model")
    (folder / MANIFEST).unlink()
    words, changes = BROKEN[name]
    for change in changes:
        change(folder)
    refuse(folder, words)


def test_a_published_folder_is_checked_against_its_manifest(sound, tmp_path):
    check_model_folder(sound)
    folder = shutil.copytree(sound, tmp_path / "model")
    os.truncate(first_shard(folder), 1000)
    refuse(folder, "1000 bytes, expected")
    point_outside(folder)
    refuse(folder, "lies outside the folder")


def test_code_that_is_not_needed_does_not_matter(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "model")
    (folder / MANIFEST).unlink()
    set_config(**AUTO_MAP)(folder)
    check_model_folder(folder)


def test_what_older_tools_left_beside_the_weights_does_not_matter(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "model")
    (folder / MANIFEST).unlink()
    change_weights(lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))(
        folder
    )
    check_model_folder(folder)
