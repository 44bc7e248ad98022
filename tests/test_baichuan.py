"""Baichuan-7B as published becomes a native Llama folder that gives the published model's numbers."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qilin_med.artifact import MANIFEST, verify_folder
from qilin_med.convert.baichuan import convert_baichuan
from qilin_med.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "baichuan7b-tiny-original"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the shared Baichuan-7B stand-in is not here")

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "llama"
    convert_baichuan(PUBLISHED, target, TEMPLATE)
    return target


@pytest.fixture(scope="module")
def published() -> Weights:
    return torch.load(PUBLISHED / "pytorch_model.bin", weights_only=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the published folder without weights; tests add theirs and change what they like."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(PUBLISHED / name, folder / name)
    return folder


def change_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def halves(weights: Weights) -> list[Weights]:
    names = list(weights)
    return [{name: weights[name] for name in part} for part in (names[: len(names) // 2], names[len(names) // 2 :])]


def save_bin_shards(source: Path, parts: list[Weights]) -> None:
    files = [f"pytorch_model-{n:05}-of-{len(parts):05}.bin" for n in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, source / file)
    index = {"metadata": {}, "weight_map": {name: f for f, part in zip(files, parts, strict=True) for name in part}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def assert_refused(source: Path, message: str) -> None:
    """UserError with this message, and nothing left beside the source."""
    target = source.parent / "made" / "llama"
    with pytest.raises(UserError, match=message):
        convert_baichuan(source, target, TEMPLATE)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def golden() -> dict:
    return json.loads((PUBLISHED / "golden_logits.json").read_text(encoding="utf-8"))


def test_golden_ids_pieces_and_text(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=False)
    for case in golden()["cases"]:
        assert tokenizer(case["text"]).input_ids == case["input_ids"]
        assert tokenizer.convert_ids_to_tokens(case["input_ids"]) == case["pieces"]
        assert tokenizer.decode(case["input_ids"]) == case["decoded"]


def test_golden_logits(converted):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, trust_remote_code=False).eval()
    for case in golden()["cases"]:
        ids = torch.tensor([case["input_ids"]])
        with torch.no_grad():
            output = model(ids, labels=ids)
        last = output.logits[0, -1]
        torch.testing.assert_close(last[:16], torch.tensor(case["last_logits_first16"]), atol=1e-4, rtol=0)
        assert output.logits[0].argmax(-1).tolist() == case["argmax"]
        assert output.loss.item() == pytest.approx(case["nll"], abs=1e-4)
        assert last.logsumexp(0).item() == pytest.approx(case["logsumexp_last"], abs=1e-4)


def test_golden_greedy_continuation(converted):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, trust_remote_code=False)
    prompt, new = golden()["greedy"]["prompt_ids"], golden()["greedy"]["new_ids"]
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(new), do_sample=False)
    assert made[0].tolist() == prompt + new


def test_every_tensor_is_the_published_one(converted, published):
    made = load_file(converted / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        packed = torch.cat([made.pop(f"{prefix}{part}_proj.weight") for part in "qkv"])
        assert torch.equal(packed, published[f"{prefix}W_pack.weight"])
    for name, tensor in made.items():
        assert torch.equal(tensor, published[name]) and tensor.dtype == published[name].dtype
    assert made.keys() == {name for name in published if "W_pack" not in name and "inv_freq" not in name}


def test_settings(converted):
    config = json.loads((converted / "config.json").read_text())
    kind = [config[key] for key in ("architectures", "model_type", "dtype")]
    assert kind == [["LlamaForCausalLM"], "llama", "float16"]
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (config["rms_norm_eps"], config["max_position_embeddings"], config["vocab_size"]) == (1e-6, 4096, 64000)
    assert (config["tie_word_embeddings"], config["hidden_act"]) == (False, "silu")
    generation = json.loads((converted / "generation_config.json").read_text())
    for settings in (config, generation):
        assert [settings[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, 2, 0]
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=False)
    assert (tokenizer.chat_template, tokenizer.model_max_length) == (TEMPLATE, 4096)
    assert not list(converted.glob("*.model")) and not list(converted.glob("*.py")) and "auto_map" not in config


SAVED: dict[str, Callable[[Path, Weights], None]] = {
    "sharded bin": lambda source, weights: save_bin_shards(source, halves(weights)),
    "safetensors": lambda source, weights: save_file(weights, source / "model.safetensors"),
}


@pytest.mark.parametrize("layout", SAVED)
def test_every_layout_of_the_source_gives_the_same(converted, published, source, layout):
    SAVED[layout](source, published)
    convert_baichuan(source, source.parent / "llama", TEMPLATE)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (source.parent / "llama" / name).read_bytes() == (converted / name).read_bytes()


def test_output_is_split_at_the_shard_size(converted, tmp_path, capsys):
    made = convert_baichuan(PUBLISHED, tmp_path / "llama", TEMPLATE, max_shard_size=8_300_000)
    lines = capsys.readouterr().out.splitlines()
    shards = sorted(tmp_path.glob("llama/model-*.safetensors"))
    assert made["shards"] == len(shards) == len([line for line in lines if line.startswith("wrote")]) == 3
    assert made["parameters"] == 8_342_976 and made["dtype"] == "float16"
    whole = load_file(converted / "model.safetensors")
    index = json.loads((tmp_path / "llama/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float16)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 125696}, "Baichuan 2"),
        ({"z_loss_weight": 0}, "Baichuan 2"),
        ({"hidden_size": 5120}, "Baichuan-13B"),
        ({"num_hidden_layers": 40}, "Baichuan-13B"),
        ({"max_position_embeddings": None, "model_max_length": 4096}, "Baichuan-13B"),
        ({"model_type": "llama"}, "already a Llama folder"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"intermediate_size": 352}, r"mlp\.\w+_proj.weight has shape"),
        ({"num_hidden_layers": 4}, r"layers\.3\..* is missing"),
        ({"num_hidden_layers": 2}, r"layers\.2\..* is no weight"),
    ],
)
def test_other_models_are_refused(source, changes, message):
    shutil.copyfile(PUBLISHED / "pytorch_model.bin", source / "pytorch_model.bin")
    change_config(source, **changes)
    assert_refused(source, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_missing_file_is_named(source, name):
    (source / name).unlink()
    assert_refused(source, name)


def test_missing_weights_and_missing_shards_are_named(source, published):
    assert_refused(source, r"no weights.*pytorch_model\.bin")
    save_bin_shards(source, halves(published))
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    assert_refused(source, "pytorch_model-00002-of-00002.bin is missing")


def test_weight_stored_twice_is_named(source, published):
    first, second = halves(published)
    save_bin_shards(source, [first, second | {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}])
    assert_refused(source, "model.embed_tokens.weight was in an earlier file")


def test_quantised_weights_are_refused(source, published):
    save_bin_shards(source, [published | {"lm_head.weight": published["lm_head.weight"].to(torch.int8)}])
    assert_refused(source, "lm_head.weight is torch.int8")


@pytest.mark.parametrize("size", [0, 100, 1_000_000, -100])
def test_truncated_bin_is_named(source, size):
    whole = (PUBLISHED / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(whole[:size])
    assert_refused(source, r"pytorch_model\.bin cannot be read")


def test_damage_inside_a_bin_is_found(source):
    whole = bytearray((PUBLISHED / "pytorch_model.bin").read_bytes())
    whole[len(whole) // 2] ^= 1
    (source / "pytorch_model.bin").write_bytes(whole)
    assert_refused(source, "CRC")


def test_truncated_safetensors_is_named(source, published):
    save_file(published, source / "model.safetensors")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-50])
    assert_refused(source, r"model\.safetensors cannot be read")


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('remote code ran')",)


def test_pickled_code_never_runs(source):
    torch.save({"model.embed_tokens.weight": Malicious()}, source / "pytorch_model.bin")
    assert_refused(source, "more than tensors")


def test_other_pickle_is_refused(source):
    torch.save([torch.zeros(2)], source / "pytorch_model.bin")
    assert_refused(source, "no table of tensors")


def test_existing_target_stays_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        convert_baichuan(PUBLISHED, tmp_path, TEMPLATE)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_full_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000_000))
    with pytest.raises(UserError, match="free"):
        convert_baichuan(PUBLISHED, tmp_path / "llama", TEMPLATE)
    assert list(tmp_path.iterdir()) == []


def test_failure_half_way_leaves_nothing_that_the_next_run_does_not_clear(converted, tmp_path):
    def interrupt(weights: Weights, file: Path, **options: object) -> None:
        save_file(weights, file, **options)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), patch("qilin_med.convert.baichuan.save_file", interrupt):
        convert_baichuan(PUBLISHED, tmp_path / "llama", TEMPLATE, max_shard_size=8_300_000)
    assert not (tmp_path / "llama").exists()
    convert_baichuan(PUBLISHED, tmp_path / "llama", TEMPLATE)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    assert verify_folder(tmp_path / "llama")["fingerprint"] == verify_folder(converted)["fingerprint"]


def test_run_again_it_is_done_and_of_other_files_refused(converted, source, published, capsys):
    before = (converted / MANIFEST).stat().st_mtime_ns
    made = convert_baichuan(PUBLISHED, converted, TEMPLATE)
    assert capsys.readouterr().out == f"{converted} was made from these files already\n"
    assert (made["parameters"], made["shards"], made["dtype"]) == (8_342_976, 1, "float16")
    assert (converted / MANIFEST).stat().st_mtime_ns == before
    torch.save(published | {"model.norm.weight": 2 * published["model.norm.weight"]}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"made from other files.*pytorch_model.bin.* exists already"):
        convert_baichuan(source, converted, TEMPLATE)


def test_command(source, tmp_path):
    command = [sys.executable, str(ROOT / "scripts/convert_baichuan.py")]
    done = subprocess.run([*command, PUBLISHED, tmp_path / "llama"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "8,342,976 parameters (float16) in 1 shard(s)" in done.stdout.splitlines()[-1]
    assert "<reserved_102>" in AutoTokenizer.from_pretrained(tmp_path / "llama").chat_template
    (source / "tokenizer.model").unlink()
    refused = subprocess.run([*command, source, tmp_path / "other"], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: .*tokenizer\.model.*\n", refused.stderr)
