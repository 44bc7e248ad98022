"""Engines do not change the training: ZeRO-3, offloading, 4-bit weights, other bases give what one plain process gives.

Ranks are real and run the stage scripts; they are forked from one server (see forked.py).
"""

import importlib.util
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from forked import run_stage
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from qilin_med.artifact import verify_folder
from qilin_med.config.experiment import LoraSettings, load_experiment
from qilin_med.config.schedule import make_schedule
from qilin_med.errors import UserError
from qilin_med.model.folder import check_model_folder, count_parameters
from qilin_med.model.load import check_packages
from qilin_med.train.job import Job
from qilin_med.train.metrics import read_metrics

STAGES = ("pretraining", "sft", "dpo")
WORDS = ["发热", "头痛", "咳嗽", "乏力", "血压", "饮食", "休息", "药", "医生", "复查"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Widths are multiples of 64, as 4-bit blocks want.
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_tokenizer) -> Path:
    """A folder with a tiny base model, data for three stages and an experiment file of three optimizer steps a stage."""
    folder, source = tmp_path_factory.mktemp("engines"), random.Random(0)
    save_base(folder / "base", LlamaConfig(vocab_size=len(small_tokenizer), **SIZES), small_tokenizer)
    texts = ["".join(source.choices(WORDS, k=source.randint(3, 20))) + "。" for _ in range(60)]
    question = {"question": texts[0]}
    chats = [{"instruction": texts[0], "input": "", "output": text} for text in texts]
    pairs = [question | {"response_chosen": text, "response_rejected": text[:6]} for text in texts]
    (folder / "cpt.txt").write_text("\n".join(texts), encoding="utf-8")
    for name, rows in (("sft", chats), ("dpo", pairs)):
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    common = {
        "epochs": 1, "max_steps": 3, "batch_size_per_device": 2, "global_batch_size": 4, "learning_rate": 1e-2,
        "warmup_ratio": 0, "weight_decay": 0.01, "scheduler": "linear", "checkpoint_every": 2, "report_to": [],
    }  # fmt: skip
    instruct = common | {"max_source_length": 48, "max_target_length": 40}
    instruct["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.0}
    experiment = {
        "name": "engines", "seed": 5, "output_dir": "unset",
        "model": {"path": str(folder / "base"), "template": "qilin", "dtype": "float32"},
        "launch": {"device": "cpu", "processes": 1},
        "pretraining": common | {"data": [str(folder / "cpt.txt")], "block_size": 32},
        "sft": instruct | {"data": [str(folder / "sft.jsonl")], "packing": True},
        "dpo": instruct | {"data": [str(folder / "dpo.jsonl")], "beta": 0.1},
    }  # fmt: skip
    (folder / "c.json").write_text(json.dumps(experiment), encoding="utf-8")
    return folder


def save_base(folder: Path, config, tokenizer) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_stages(world: Path, name: str, *overrides: str, every: dict | None = None) -> Path:
    """Run all stages, with `every` set in each; returns the run folder."""
    for stage in STAGES:
        own = [f"{stage}.{key}={json.dumps(value)}" for key, value in (every or {}).items()]
        run_stage(world / "c.json", stage, f"output_dir={world / name}", *own, *overrides)
    return world / name


def losses(run: Path, stage: str) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_metrics(run / stage / "metrics.jsonl")], dtype=torch.float64)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(world) -> Path:
    """The run that all others are held against: one process, no DeepSpeed."""
    return run_stages(world, "plain")


def assert_same_training(run: Path, plain: Path) -> None:
    for stage in STAGES:
        torch.testing.assert_close(losses(run, stage), losses(plain, stage), rtol=0, atol=5e-6)
        verify_folder(run / stage / "merged")
        ours, theirs = weights(run / stage / "merged"), weights(plain / stage / "merged")
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4, msg=f"{stage} {name}")


def on_two_ranks(world: Path, engine: str) -> Path:
    settings = {"deepspeed": f"configs/deepspeed/{engine}.json", "activation_checkpointing": engine == "zero3_offload"}
    return run_stages(world, engine, "launch.processes=2", every=settings)


@pytest.fixture(scope="module")
def zero3(world) -> Path:
    return on_two_ranks(world, "zero3")


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload"])
def test_an_engine_trains_like_one_plain_process(world, plain, zero3, engine):
    assert_same_training(zero3 if engine == "zero3" else on_two_ranks(world, engine), plain)


@pytest.mark.parametrize(("stage", "ranks"), [("pretraining", 2), ("pretraining", 1), ("dpo", 1)])
def test_a_stopped_stage_goes_on_with_the_same_and_another_number_of_ranks(world, zero3, tmp_path, stage, ranks):
    """Two ranks of ZeRO-3, stopped after the second of three steps: what they wrote of the third is removed."""
    shutil.copytree(zero3 / stage, tmp_path / stage, ignore=shutil.ignore_patterns("merged", "checkpoint-3"))
    parent = {"pretraining": world / "base", "dpo": zero3 / "sft" / "merged"}[stage]
    run_stage(
        world / "c.json", stage, f"output_dir={tmp_path}", f"launch.processes={ranks}", f"{stage}.parent={parent}",
        f"{stage}.deepspeed=configs/deepspeed/zero3.json",
    )  # fmt: skip
    ours, whole = weights(tmp_path / stage / "merged"), weights(zero3 / stage / "merged")
    exact = ranks == 2
    torch.testing.assert_close(losses(tmp_path, stage), losses(zero3, stage), rtol=0, atol=0 if exact else 1e-6)
    for name, weight in whole.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0 if exact else 1e-5)


def test_adapters_on_4_bit_weights_are_merged_into_whole_ones(world, plain):
    """One plain process and two ranks of ZeRO-2, pre-training with an adapter too."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "quantization": "nf4"}
    runs = [
        run_stages(world, "nf4", every={"lora": lora}),
        run_stages(world, "nf4-2", "launch.processes=2",
                   every={"lora": lora, "deepspeed": "configs/deepspeed/zero2_offload.json"}),
    ]  # fmt: skip
    parent = world / "base"
    for stage in STAGES:
        one, two = (losses(run, stage) for run in runs)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3)
        assert one[-1] < one[0]
        folder = runs[0] / stage
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        before, after = weights(parent), weights(folder / "merged")
        for name, weight in after.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            change = 0.0
            if f"{key}.lora_A.weight" in adapter:
                change = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"] * (8 / 4)
            torch.testing.assert_close(weight, before[name] + change, rtol=0, atol=1e-6)
        assert len(adapter) == 2 * 7 * SIZES["num_hidden_layers"]
        parent = folder / "merged"
    rounding = abs(losses(runs[0], "pretraining")[0] - losses(plain, "pretraining")[0])
    assert 1e-6 < rounding < 0.05  # the base is rounded, but not much
    assert math.isclose(losses(runs[0], "dpo")[0], math.log(2), abs_tol=1e-6)


def test_dpo_starts_at_ln_2_in_bf16(world):
    """The reference's log-probabilities are not rounded to the weights' precision, which is up to 0.25 at 64."""
    deepspeed = "dpo.deepspeed=configs/deepspeed/zero2.json"
    run_stage(
        world / "c.json", "dpo", f"output_dir={world / 'bf16'}", f"dpo.parent={world / 'base'}", "dpo.max_steps=1",
        "model.dtype=bfloat16", deepspeed,
    )  # fmt: skip
    # Rounded, they made it 0.6865. Processors that multiply bf16 in hardware give another batch other last digits.
    assert math.isclose(losses(world / "bf16", "dpo")[0], math.log(2), abs_tol=1e-3)


def test_another_base_with_its_own_template_goes_through_all_stages(world):
    """Qwen3's architecture, tied embeddings, a byte-level vocabulary, ChatML without marks, another EOS token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(WORDS, trainer)
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=marks[0], chat_template=CHATML)
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=16, tie_word_embeddings=True, **SIZES)
    save_base(world / "qwen", config, tokenizer)
    run = run_stages(world, "qwen-run", f"model.path={world / 'qwen'}", "model.template=own")
    for stage in STAGES:
        assert losses(run, stage)[-1] < losses(run, stage)[0]
    assert math.isclose(losses(run, "dpo")[0], math.log(2), abs_tol=1e-6)
    made = AutoModelForCausalLM.from_pretrained(run / "dpo" / "merged")
    assert made.config.model_type == "qwen3"
    assert made.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids([marks[0], marks[2]])


def job(world: Path, *overrides: str) -> Job:
    experiment = load_experiment(world / "c.json", overrides)
    return Job(experiment, "sft", world / "base", "", world, make_schedule("sft", experiment.sft, 60, 1))


def test_what_does_not_go_together_is_refused(world, tmp_path):
    bare = tmp_path / "zero3.json"
    bare.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match="without weights"):
        job(world, f"sft.deepspeed={bare}").check_engine()
    with pytest.raises(UserError, match=r"cannot split 4-bit weights.*zero2\.json"):
        job(world, "sft.deepspeed=configs/deepspeed/zero3.json", "sft.lora.quantization=nf4").check_engine()
    for setting in ("model.fused_kernels=true", "model.attention=flash_attention_2"):
        with pytest.raises(UserError, match=r"runs? on a GPU"):
            job(world, setting)


def test_what_would_train_on_wrong_logits_is_refused(world, tmp_path, small_tokenizer):
    save_base(tmp_path, Gemma2Config(vocab_size=len(small_tokenizer), head_dim=16, **SIZES), small_tokenizer)
    with pytest.raises(UserError, match="gemma2 scales or caps its logits"):
        check_model_folder(tmp_path)
    base = check_model_folder(world / "base")
    head = LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=["lm_head"])
    with pytest.raises(UserError, match="covers the output head"):
        count_parameters(base, head)
    hidden, inner, vocabulary, layers = 64, 128, len(small_tokenizer), 2
    # Two of four heads are for keys and values.
    layer = 2 * hidden**2 + 2 * hidden**2 // 2 + 3 * hidden * inner + 2 * hidden
    assert count_parameters(base, None) == ((2 * vocabulary * hidden + layers * layer + hidden),) * 2


@pytest.mark.parametrize(
    ("module", "setting"),
    [("flash_attn", "model.attention=flash_attention_2"), ("liger_kernel", "model.fused_kernels=true")],
)
def test_a_missing_package_is_named(world, module, setting):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    gpu = ("launch.device=cuda", "model.dtype=bfloat16")
    with pytest.raises(UserError, match=r"is not installed: .*pip install -r requirements-gpu.txt .*, or set model\."):
        check_packages(job(world, setting, *gpu).experiment.model, training=True)
