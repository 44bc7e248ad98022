"""The planner against PEFT, DeepSpeed's own estimators, passes over all layers of the 7B model, and memory measured here."""

import ctypes
import gc
import json
import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qilin_med.config.experiment import STAGES, LoraSettings, load_experiment
from qilin_med.errors import UserError
from qilin_med.model.load import lora_config
from qilin_med.model.losses import forward_through_head, token_losses
from qilin_med.plan import fake_run, preflight
from qilin_med.plan.data import Amount, stated_amount
from qilin_med.plan.duration import (
    PUBLISHED_MFU,
    Exchange,
    Rates,
    at_mfu,
    count_checkpoints,
    exchange,
    ring_seconds,
    stage_duration,
    utilisation,
)
from qilin_med.plan.machines import GPUS, Machines
from qilin_med.plan.measure import Unmeasured
from qilin_med.plan.plan import Engine, StagePlan, Work, plan_stage
from qilin_med.plan.preflight import cheapest_change
from qilin_med.plan.tables import alternatives

ROOT = Path(__file__).resolve().parents[1]
BAICHUAN = ROOT / "configs/architectures/baichuan-7b.json"
QWEN = ROOT / "configs/architectures/qwen3-8b.json"
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory):
    """Nothing measured before counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def gpus(number: int, name: str) -> Machines:
    return Machines(1, number, GPUS[name].memory, GPUS[name].bf16 * 1e12, GPUS[name].bandwidth)


EIGHT = gpus(8, "a100-80g")


def paper(
    stage: str, machines: Machines = EIGHT, *overrides: str, amount: Amount | None = None, config=BAICHUAN
) -> StagePlan:
    experiment = load_experiment(ROOT / "configs/qilin_med_7b.json", overrides)
    return plan_stage(experiment, stage, config, machines, amount)


# ------------------------------------------------------------------------------------------------------ parameters


def test_baichuan_has_the_published_number_of_parameters():
    assert paper("pretraining").parameters == 7_000_559_616


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*self_attn\.(q|k)_proj"])
@pytest.mark.parametrize("path", [BAICHUAN, QWEN], ids=lambda path: path.stem)
def test_parameters_are_those_of_transformers_and_peft(path, targets):
    from peft import get_peft_model

    planned = paper("sft", EIGHT, f"sft.lora.target_modules={json.dumps(targets)}", config=path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
        model = get_peft_model(model, lora_config(planned.section.lora))
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert planned.parameters == sum(n for n, _ in counts)
    assert planned.trainable == sum(n for n, trained in counts if trained)


def test_adapters_on_split_q_k_v_have_three_a_matrices_and_on_the_published_fused_layer_one():
    from peft import LoraConfig, inject_adapter_in_model

    assert paper("sft").trainable == 19_988_480
    fused = {"W_pack": (4096, 3 * 4096), "o_proj": (4096, 4096), "gate_proj": (4096, 11008), "up_proj": (4096, 11008),
             "down_proj": (11008, 4096)}  # fmt: skip
    with torch.device("meta"):
        layers = [
            torch.nn.ModuleDict({n: torch.nn.Linear(*s, bias=False) for n, s in fused.items()}) for _ in range(32)
        ]
        model = inject_adapter_in_model(LoraConfig(r=8, target_modules=list(fused)), torch.nn.ModuleList(layers))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 17_891_328
    assert 19_988_480 - 17_891_328 == 32 * 2 * 8 * 4096


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5, "intermediate_size": 96,
         "vocab_size": 500, "max_position_embeddings": 64, "head_dim": 16}  # fmt: skip
MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
}
ARCHITECTURES = {
    "gpt2": {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 5,
        "n_positions": 64,
        "vocab_size": 500,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": SMALL | {"tie_word_embeddings": True},
    "mistral": SMALL,
    "gemma": SMALL,
    "qwen3_moe": SMALL | MOE,
    "mixtral": SMALL | {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_any_architecture_that_trains_is_measured(family, tmp_path):
    """Exactly as in a pass over all of its layers, also where a dense layer comes before the experts."""
    AutoConfig.for_model(family, **ARCHITECTURES[family]).save_pretrained(tmp_path)
    shape = ["pretraining.block_size=32", "pretraining.batch_size_per_device=2", "pretraining.global_batch_size=null"]
    planned = paper("pretraining", EIGHT, *shape, config=tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    whole = fake_run.costs_of(planned.request, depth=5, rows=3)
    larger = planned.changed(batch_size_per_device=3)
    assert {name: larger.cost(name) for name in whole} == pytest.approx(whole, rel=0.02)


def test_a_model_that_cannot_be_measured_gets_a_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(Unmeasured, match="a model of type 'no_such_model' cannot be measured"):
        paper("pretraining", config=tmp_path)
    experiment = load_experiment(ROOT / "configs/qilin_med_7b.json")
    note = preflight.check_machine(experiment, "pretraining", tmp_path, None, 8, 1, 80 * GIB)
    assert note.startswith("memory and disk not checked: a model of type")


# ---------------------------------------------------------------------------------------------------- model states


def states_of(planned: StagePlan) -> float:
    """What DeepSpeed's estimators count: weights, gradients with their fp32 copy, optimizer states."""
    step = planned.moments[-1]
    return step.weights + step.gradients + step.optimizer


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_model_states_are_those_of_deepspeeds_estimators(ranks):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    planned = paper("pretraining", gpus(ranks, "a100-80g"))
    parameters, largest = planned.parameters, 64_000 * 4096
    for offload in (False, True):
        two = replace(planned, engine=Engine(2, offload_optimizer=offload))
        host, gpu = estimate_zero2_model_states_mem_needs(parameters, ranks, 1, offload, additional_buffer_factor=1)
        assert states_of(two) == pytest.approx(gpu, rel=0.01)
        if offload and ranks <= 4:  # with more ranks the estimator's host memory is that of loading, in fp32
            assert two.offloaded - 2 * parameters == pytest.approx(host, rel=0.01)
        three = replace(planned, engine=Engine(3, offload, offload))
        _, gpu, gathered = estimate_zero3_model_states_mem_needs(parameters, largest, ranks, 1, offload, offload)
        # Stage 3 keeps gradients in bf16 beside the fp32 ones that the estimator counts.
        kept = next(memory.gradients for memory in three.moments if memory.moment == "end of backward")
        assert states_of(three) - kept == pytest.approx(gpu - gathered, rel=0.01, abs=1)


# ------------------------------------------------------------------------------------------------- the whole 7B model


@pytest.mark.parametrize(("stage", "rows"), [("pretraining", 4), ("dpo", 3)])
def test_few_layers_tell_what_all_32_cost(stage, rows):
    """Memory within 1%, operations exactly."""
    planned = paper(stage)
    whole = fake_run.costs_of(planned.request, depth=32, rows=rows)
    larger = planned.changed(batch_size_per_device=rows)
    assert {name: larger.cost(name) for name in whole} == pytest.approx(whole, rel=0.01)


# GiB a rank and FLOP of an optimizer step by formulas: arXiv:2205.05198, and 2 FLOP a weight and token.
GIVEN = {
    "CPT": ("pretraining", EIGHT, [], 32.390, 3.5088e14),
    "CPT recomputed": ("pretraining", EIGHT, ["activation_checkpointing=true"], 28.709, 4.3774e14),
    "CPT ZeRO-3": ("pretraining", gpus(4, "3090-24g"), ["deepspeed=configs/deepspeed/zero3.json"], 35.168, 3.5088e14),
    "SFT": ("sft", EIGHT, [], 31.980, 1.0751e16),
    "SFT kept": ("sft", EIGHT, ["activation_checkpointing=false"], 250.638, 7.2481e15),
    "DPO": ("dpo", gpus(4, "3090-24g"), [], 17.029, 1.3438e15),
    "DPO kept": ("dpo", EIGHT, ["activation_checkpointing=false"], 44.328, 9.0601e14),
    "CPT fp32": ("pretraining", EIGHT, ["model.dtype=float32"], 53.211, 3.4659e14),
    "CPT fused": ("pretraining", EIGHT, ["model.fused_kernels=true"], 30.718, 3.5088e14),
    "CPT eager": ("pretraining", EIGHT, ["model.attention=eager"], 38.327, 3.5088e14),
    "SFT flash": ("sft", gpus(1, "a100-80g"), ["model.attention=flash_attention_2"], 32.177, 1.0592e16),
}


@pytest.mark.parametrize("case", GIVEN)
def test_memory_and_operations_are_those_of_the_formulas(case):
    stage, machines, overrides, gibibytes, flops = GIVEN[case]
    planned = paper(stage, machines, *(o if o.startswith("model.") else f"{stage}.{o}" for o in overrides))
    assert planned.memory.total / GIB == pytest.approx(gibibytes, rel=0.02)
    assert planned.training_flops(planned.step_work) == pytest.approx(flops, rel=0.02)


# ------------------------------------------------------------------------------------------------- fits, and refusals


def test_the_papers_machines_are_large_enough():
    for stage, machines in (
        ("pretraining", gpus(8, "a100-80g")),
        ("sft", gpus(8, "a100-80g")),
        ("dpo", gpus(4, "3090-24g")),
    ):
        assert paper(stage, machines).verdict == "fits"


@pytest.mark.parametrize(
    ("stage", "machines", "overrides", "change"),
    [
        ("dpo", gpus(4, "3090-24g"), ["dpo.batch_size_per_device=16"], "dpo.batch_size_per_device=8 dpo.global_batch_size=64"),
        ("sft", gpus(8, "a100-80g"), ["sft.activation_checkpointing=false", "sft.batch_size_per_device=512"],
         "sft.batch_size_per_device=8 sft.global_batch_size=4096"),
        ("pretraining", gpus(8, "3090-24g"), [],
         "pretraining.activation_checkpointing=true pretraining.deepspeed=configs/deepspeed/zero3.json"),
        ("pretraining", gpus(1, "3090-24g"), ["pretraining.global_batch_size=8"],
         "pretraining.deepspeed=configs/deepspeed/zero2_offload.json"),
    ],
)  # fmt: skip
def test_the_advice_is_the_cheapest_change_that_fits(stage, machines, overrides, change):
    overrides = [*overrides, f"{stage}.global_batch_size=null"] if stage != "pretraining" else overrides
    plan = paper(stage, machines, *overrides)
    assert plan.verdict != "fits"
    assert cheapest_change(plan) == change
    assert paper(stage, machines, *overrides, *change.split()).verdict == "fits"


def test_a_run_that_cannot_fit_is_refused_with_what_to_change(tmp_path, monkeypatch):
    plan = paper("pretraining", gpus(1, "3090-24g"), "pretraining.global_batch_size=8")
    with pytest.raises(
        UserError, match=r"needs about \d+\.\d GiB .* 24\.0 GiB are there; cheapest change: .*zero2_offload"
    ):
        preflight.check_memory(plan)
    usage = shutil.disk_usage(tmp_path)._replace(free=300 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    preflight.check_disk(plan, tmp_path)  # 326 GiB are needed: within the error of the estimate
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=250 * GIB))
    with pytest.raises(UserError, match=r"326.* GiB needed for 2 \+ 1 checkpoints .* 250.0 GiB free"):
        preflight.check_disk(plan, tmp_path)


def test_the_largest_batch_stops_at_a_ranks_part_of_an_optimizer_step():
    plan = paper("pretraining", gpus(8, "a100-80g"))
    assert (plan.schedule.global_batch_size, plan.rows_of_a_rank) == (8, 1)
    assert [plan.largest_batch(most) for most in (1, 3)] == [1, 3]
    assert replace(plan, machines=replace(plan.machines, memory=20 * GIB)).largest_batch(1) == 0
    found = plan.largest_batch(1000)
    totals = [plan.changed(batch_size_per_device=rows).memory.total * 1.1 / GIB for rows in (found, found + 1)]
    assert totals[0] <= 80 < totals[1]


def test_blocks_are_full_however_short_their_documents_are():
    amount = Amount(rows=10_000, tokens=1e5, trained=1e5, longest=30, source="")
    assert paper("pretraining", gpus(8, "a100-80g"), amount=amount).length == 1024
    assert paper("sft", gpus(8, "a100-80g"), amount=amount).length == 30


def test_the_demo_fits_a_machine_of_8_gib(tmp_path):
    small = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
             "intermediate_size": 384, "vocab_size": 1280}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(json.loads(BAICHUAN.read_text()) | small))
    experiment = load_experiment(ROOT / "configs/demo.json")
    for stage in STAGES:
        assert plan_stage(experiment, stage, tmp_path, Machines(1, 2, 3 * GIB)).verdict == "fits"


def test_a_quantised_stage_is_offered_no_zero_3():
    quantised = paper("sft", gpus(1, "4090-24g"), "sft.lora.quantization=nf4", "sft.activation_checkpointing=false")
    assert [plan.engine.name for plan in alternatives(quantised)] == ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-2 + offload"]
    assert "zero3" not in cheapest_change(quantised)


# ------------------------------------------------------------------------------------------------------------ time


def amount_of(stage: str, **numbers: float) -> Amount:
    given = {"rows": None, "tokens": None} | numbers
    return stated_amount(load_experiment(ROOT / "configs/qilin_med_7b.json"), stage, **given)


@pytest.fixture(scope="module")
def cpt() -> StagePlan:
    return paper("pretraining", amount=amount_of("pretraining", tokens=2.122e9))


def test_a_ring_over_8_ranks_moves_7_eighths_once_or_twice():
    nvlink, pcie = GPUS["a100-80g"].bandwidth, GPUS["4090-24g"].bandwidth
    assert ring_seconds(14e9, 8, nvlink, 2) == pytest.approx(0.1065, abs=1e-4)  # 2 x 7/8 x 14 GB at 230 GB/s
    assert ring_seconds(14e9, 8, nvlink, 1) == pytest.approx(0.0533, abs=1e-4)
    assert ring_seconds(14e9, 8, pcie, 2) + ring_seconds(14e9, 8, pcie, 1) == pytest.approx(1.8375)
    assert ring_seconds(14e9, 1, pcie, 2) == 0


@pytest.mark.parametrize(
    ("engine", "accumulation", "sent"),
    [
        (Engine(2, overlaps=True), 1, Exchange(backward=2, after=1)),
        (Engine(2, overlaps=True), 4, Exchange(backward=8, after=1)),
        (Engine(2), 4, Exchange(after=9)),
        (Engine(1, overlaps=True), 4, Exchange(backward=2, after=1)),
        (Engine(0), 4, Exchange(after=2)),
        (Engine(3), 4, Exchange(forward=4, backward=8)),
        (Engine(), 4, Exchange(backward=4)),  # fp32 gradients
    ],
)
def test_what_is_sent_by_stage_of_zero(engine, accumulation, sent):
    """In passes of the bf16 weights around the ring."""
    once = 7 / 8 * 2 * 7_000_559_616
    planned = replace(paper("pretraining", EIGHT, f"pretraining.global_batch_size={8 * accumulation}"), engine=engine)
    assert exchange(planned, bandwidth=once) == pytest.approx(sent)


def test_model_flops_are_palms_whatever_is_recomputed():
    per_token = 6 * (32 * 202_375_168 + 64_000 * 4096) + 12 * 32 * 4096 * 1024  # 6 N + 12 L d T
    for changes in ([], ["pretraining.activation_checkpointing=true"], ["model.attention=flash_attention_2"]):
        assert paper("pretraining", EIGHT, *changes).model_flops(Work(1, 1)) == per_token
    adapters = 4 * (32 * 202_375_168 + 64_000 * 4096) + 6 * 19_988_480 + 12 * 32 * 4096 * 512
    assert paper("sft").model_flops(Work(1, 1)) == adapters


def test_the_papers_pretraining_at_the_best_published_rate_and_at_our_estimate(cpt):
    assert cpt.schedule.steps == 777_102
    published = at_mfu(cpt, PUBLISHED_MFU) / 3600
    assert published == pytest.approx(3 * 2.122e9 / (8 * 4357) / 3600, rel=1e-3)
    assert published == pytest.approx(50.7, abs=0.05)
    time = stage_duration(cpt, Rates(efficiency=0.5, disk=2e9))
    assert time.checkpoints == 73 and time.writing == pytest.approx(73 * 56, rel=1e-3)  # 112 GB an hour
    assert time.writing / time.total < 0.02
    assert time.compute == pytest.approx(cpt.training_flops(cpt.work()) / (8 * 312e12 * 0.5))
    assert time.waiting == pytest.approx(777_102 * ring_seconds(2 * 7_000_559_616, 8, 230e9, 1))  # the weights' gather
    mfu, hfu = utilisation(cpt, time.total)
    assert mfu == pytest.approx(PUBLISHED_MFU * published * 3600 / time.total) and mfu < hfu < 0.5
    assert stage_duration(cpt, Rates(0.5, 2e9, mfu=PUBLISHED_MFU)).total == pytest.approx(published * 3600)


def test_the_script_prints_our_estimate_beside_the_published_rate():
    command = [
        sys.executable,
        "scripts/plan.py",
        "--config",
        "configs/qilin_med_7b.json",
        "--model-config",
        str(BAICHUAN),
    ]
    amounts = ["--gpus", "8", "--tokens", "pretraining=2.122e9", "sft=4.816e9", "--rows", "sft=11779500", "dpo=6000"]
    said = subprocess.check_output([*command, *amounts], cwd=ROOT, text=True)
    for words in (
        "largest batch that fits: 1, a rank's part of an optimizer step",
        "777,102 optimizer steps, 6,366,000,000 tokens",
        "23,007 optimizer steps",
        "188 optimizer steps",
        "; 50.7 hours (2.11 days) at the best published MFU",
        "all stages: ",
    ):
        assert words in said, said
    said = subprocess.check_output(
        [*command, "--stage", "sft", "--gpu", "910b-64g", "--mfu", "0.4"], cwd=ROOT, text=True
    )
    assert said.startswith("910b-64g: for planning only") and "s at an MFU of 40.0%, as stated" in said


def test_gradients_are_waited_for_where_they_travel_longer_than_the_backward_pass(cpt):
    slow = replace(cpt, machines=replace(EIGHT, bandwidth=20e9))
    reduced, gathered = (ring_seconds(2 * 7_000_559_616, 8, 20e9, passes) for passes in (2, 1))
    time = stage_duration(slow, Rates(0.5, 2e9))
    hidden = reduced + gathered - time.waiting / 777_102
    assert hidden == pytest.approx(2 / 3 * time.compute / 777_102, rel=0.02)  # the backward pass


def test_sft_counts_conversations_and_padding_only_where_there_is_some():
    amount = amount_of("sft", rows=11_779_500, tokens=4.816e9)  # Table 2
    for packing, tokens in (("true", 4.816e9), ("false", 11_779_500 * 512)):
        plan = paper("sft", EIGHT, f"sft.packing={packing}", amount=amount)
        assert (plan.schedule.steps, plan.length, plan.work().tokens) == (23_007, 512, tokens)


def test_a_checkpoint_is_due_by_either_interval(cpt):
    assert cpt.checkpoint_bytes == 16 * 7_000_559_616  # 112 GB: 56 s at 2 GB/s
    day = 86_400
    assert count_checkpoints(30, None, steps=5000, seconds=day) == 1 + 48
    assert count_checkpoints(30, 1000, steps=5000, seconds=day) == 1 + 48
    assert count_checkpoints(30, 50, steps=5000, seconds=day) == 1 + 100
    assert count_checkpoints(None, 1000, steps=777_102, seconds=day) == 1 + 777
    assert count_checkpoints(None, None, steps=5000, seconds=day) == 1


# ------------------------------------------------------------------------------------------------ measured, real runs


def real_model(path: Path, lora: LoraSettings | None, recomputed: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(lora))
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def optimizer_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, shape: tuple[int, int]) -> None:
    """Two, of forward, our loss, backward and AdamW."""
    ids = torch.zeros(shape, dtype=torch.long)
    for _ in range(2):
        forward_through_head(
            model,
            {"input_ids": ids},
            lambda hidden, head: token_losses(hidden.flatten(0, 1), head, ids.flatten(), "sum"),
        ).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()


def measured(path: Path, lora: LoraSettings | None, recomputed: bool) -> float:
    """By how much this process grows in two optimizer steps, model included."""
    optimizer_steps(real_model(path, lora, False), None, (1, 8))  # loads the libraries
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that stay with the process would hide growth
    before = _memory("VmRSS")
    model = real_model(path, lora, recomputed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    optimizer_steps(model, optimizer, (4, 256))
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.parametrize(
    ("lora", "recomputed"), [(False, False), (False, True), (True, False)], ids=["cpt", "cpt recomputed", "sft"]
)
def test_memory_of_small_real_runs(tmp_path, monkeypatch, lora, recomputed):
    """Within 15%: the libraries' scratch memory is in the measurement alone."""
    small = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = json.loads(BAICHUAN.read_text()) | small | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    adapter = {"rank": 8, "alpha": 32, "dropout": 0.05} if lora else None
    settings = {"deepspeed": None, "block_size": 256, "isolate_documents": False, "batch_size_per_device": 4,
                "global_batch_size": None, "lora": adapter, "activation_checkpointing": recomputed}  # fmt: skip
    overrides = [f"pretraining.{name}={json.dumps(value)}" for name, value in settings.items()]
    machine = Machines(1, 1, 8 * GIB)
    planned = paper("pretraining", machine, *overrides, "launch.device=cpu", "model.dtype=float32", config=tmp_path)
    # In a process where glibc hands every freed tensor back: else its heap keeps up to half as much again in pieces.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "1000000")
    with multiprocessing.get_context("spawn").Pool(1) as process:
        found = process.apply(measured, (tmp_path, planned.section.lora, recomputed))
    memory = planned.memory
    print(f"{(memory.total - memory.other) / found - 1:+.1%} of {found / 2**20:.0f} MiB ({memory.moment})")
    assert memory.total - memory.other == pytest.approx(found, rel=0.15)
