"""The planner against PEFT, DeepSpeed's own estimators, fake-tensor runs of the whole 7B model, and memory measured here."""

import ctypes
import gc
import json
import multiprocessing
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from qilin_med.config.experiment import STAGES, LoraSettings, load_experiment
from qilin_med.errors import UserError
from qilin_med.model.load import lora_config
from qilin_med.model.losses import forward_through_head, token_losses
from qilin_med.plan import preflight
from qilin_med.plan.advice import cheapest_change
from qilin_med.plan.architecture import read_architecture
from qilin_med.plan.compute import Work, model_flops, training_flops
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
from qilin_med.plan.engine import Engine
from qilin_med.plan.gpus import GPUS
from qilin_med.plan.memory import Training, model_states, moments, plan_memory, step_gradients
from qilin_med.plan.plan import Machines, StagePlan, largest_batch, plan_stage
from qilin_med.plan.storage import checkpoint_bytes, offloaded_bytes

ROOT = Path(__file__).resolve().parents[1]
BAICHUAN = ROOT / "configs/architectures/baichuan-7b.json"
QWEN = ROOT / "configs/architectures/qwen3-8b.json"
LORA = LoraSettings(rank=8, alpha=32, dropout=0.05)
PLAIN = Engine(deepspeed=False, zero=0)
GIB = 2**30


def training(path: Path = BAICHUAN, **changes) -> Training:
    settings = {
        "architecture": read_architecture(path), "engine": PLAIN, "lora": None, "dtype": "bfloat16", "on_gpu": True,
        "attention": "sdpa", "fused": False, "checkpointing": False, "ranks": 1, "local_ranks": 1, "rows": 1,
        "sequences": 1, "length": 1024, "targets": 1.0, "accumulates": False,
    }  # fmt: skip
    return Training(**settings | changes)


def model_on(device: str, path: Path, dtype: torch.dtype, lora: LoraSettings | None) -> torch.nn.Module:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        if lora:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(lora)).to(dtype)
    return model.train()


# ------------------------------------------------------------------------------------------------------ parameters


def test_baichuan_has_the_published_number_of_parameters():
    assert read_architecture(BAICHUAN).parameters == 7_000_559_616


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*self_attn\.(q|k)_proj"])
@pytest.mark.parametrize("path", [BAICHUAN, QWEN], ids=lambda path: path.stem)
def test_parameters_are_those_of_transformers_and_peft(path, targets):
    lora = LORA.model_copy(update={"target_modules": targets})
    counts = [(p.numel(), p.requires_grad) for p in model_on("meta", path, torch.float32, lora).parameters()]
    planned = training(path, lora=lora)
    assert planned.parameters == sum(n for n, _ in counts)
    assert planned.trainable == sum(n for n, trained in counts if trained)


def test_adapters_on_split_q_k_v_have_three_a_matrices_and_on_the_published_fused_layer_one():
    from peft import LoraConfig, inject_adapter_in_model

    assert training(lora=LORA).trainable == 19_988_480
    fused = {"W_pack": (4096, 3 * 4096), "o_proj": (4096, 4096), "gate_proj": (4096, 11008), "up_proj": (4096, 11008),
             "down_proj": (11008, 4096)}  # fmt: skip
    with torch.device("meta"):
        layers = [
            torch.nn.ModuleDict({n: torch.nn.Linear(*s, bias=False) for n, s in fused.items()}) for _ in range(32)
        ]
        model = inject_adapter_in_model(LoraConfig(r=8, target_modules=list(fused)), torch.nn.ModuleList(layers))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 17_891_328
    assert 19_988_480 - 17_891_328 == 32 * 2 * 8 * 4096


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_biases_and_tied_embeddings_are_counted(family, tmp_path):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
             "intermediate_size": 96, "vocab_size": 500}  # fmt: skip
    AutoConfig.for_model(family, **shape, tie_word_embeddings=family == "qwen2").save_pretrained(tmp_path)
    counted = sum(p.numel() for p in model_on("meta", tmp_path, torch.float32, None).parameters())
    assert read_architecture(tmp_path).parameters == counted


# ---------------------------------------------------------------------------------------------------- model states


def states_of(planned: Training) -> float:
    """What DeepSpeed's estimators count: weights, gradients with their fp32 copy, optimizer states."""
    states = model_states(planned)
    return states.weights + states.gradients + states.optimizer + step_gradients(planned)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_model_states_are_those_of_deepspeeds_estimators(ranks):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    a = read_architecture(BAICHUAN)
    machine = {"ranks": ranks, "local_ranks": ranks}
    for offload in (False, True):
        two = training(engine=Engine(True, 2, offload_optimizer=offload), **machine)
        host, gpu = estimate_zero2_model_states_mem_needs(a.parameters, ranks, 1, offload, additional_buffer_factor=1)
        assert states_of(two) == pytest.approx(gpu, rel=0.01)
        if offload and ranks <= 4:  # with more ranks the estimator's host memory is that of loading, in fp32
            assert offloaded_bytes(two) - 2 * a.parameters == pytest.approx(host, rel=0.01)
        three = training(engine=Engine(True, 3, offload, offload), **machine)
        _, gpu, gathered = estimate_zero3_model_states_mem_needs(a.parameters, a.embedding, ranks, 1, offload, offload)
        # Stage 3 keeps gradients in bf16 beside the fp32 ones that the estimator counts.
        assert states_of(three) - model_states(three).gradients == pytest.approx(gpu - gathered, rel=0.01, abs=1)


# ----------------------------------------------------------------------------------- the whole model, fake tensors


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive, and the most that there were."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()
        self.add(tensors)

    def add(self, tree) -> None:
        for tensor in tree_iter(tree):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.remove, storage.nbytes())

    def remove(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result


def fake_model(planned: Training, path: Path) -> torch.nn.Module:
    """A model of fake tensors on the CPU. To be called in FakeTensorMode; PEFT cannot, so it works on meta tensors."""
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[planned.dtype]
    with unset_fake_temporarily():
        model = model_on("meta", path, dtype, planned.lora)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            module._parameters[name] = fake
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    if planned.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def update(model: torch.nn.Module, planned: Training) -> None:
    """Forward, our loss, backward, as the trainers do it."""
    shape = planned.rows * planned.sequences, planned.length
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.arange(planned.length).expand(shape)

    def loss(hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
        scored = slice(planned.target_tokens)
        return token_losses(hidden.flatten(0, 1)[scored], head, ids.flatten()[scored], "sum")

    forward_through_head(model, {"input_ids": ids, "position_ids": positions}, loss).backward()


CASES = {  # layers of the 7B model's 32, as every operation on fake tensors takes its time
    "cpt": (32, {"rows": 4}),
    "cpt recomputed": (4, {"rows": 32, "checkpointing": True}),
    "sft": (4, {"lora": LORA, "rows": 8, "length": 512, "targets": 0.5}),
    "sft recomputed": (4, {"lora": LORA, "rows": 64, "length": 512, "targets": 0.5, "checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_and_flops_of_the_7b_model(case, tmp_path):
    """Peak within 10%, operations within 2%, of a fake-tensor run of forward, loss and backward."""
    layers, settings = CASES[case]
    config = json.loads(BAICHUAN.read_text()) | {"num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = training(tmp_path, engine=Engine(True, 0), on_gpu=False, **settings)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counter = FlopCounterMode(
        display=False,
        custom_mapping={  # the counter knows these on a GPU only
            attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
        },
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(planned, tmp_path)
        with LiveBytes(*model.parameters(), *model.buffers()) as memory:
            update(model, planned)
        model.zero_grad()
        with counter:  # a pass of its own: the counter keeps recomputed tensors alive
            update(model, planned)
    expected = max(
        m.weights + m.gradients + m.activations + m.loss for m in moments(planned) if m.moment != "optimizer step"
    )
    a, flops = planned.architecture, training_flops(planned, Work(planned.tokens, planned.target_tokens))
    # The forward pass of the chunked loss is one operator that cannot be looked into.
    counted = counter.get_total_flops() + 2 * a.embedding * planned.target_tokens
    print(f"{case}: memory {expected / memory.peak - 1:+.1%} of {memory.peak / GIB:.2f} GiB,"
          f" operations {flops / counted - 1:+.2%} of {counted:.4g}")  # fmt: skip
    assert expected == pytest.approx(memory.peak, rel=0.10)
    assert flops == pytest.approx(counted, rel=0.02)


# ------------------------------------------------------------------------------------------------- fits, and refusals


def paper(stage: str, machines: Machines, *overrides: str, amount: Amount | None = None) -> StagePlan:
    experiment = load_experiment(ROOT / "configs/qilin_med_7b.json", overrides)
    return plan_stage(experiment, stage, read_architecture(BAICHUAN), machines, amount)


def gpus(number: int, name: str) -> Machines:
    return Machines(1, number, GPUS[name].memory, GPUS[name].bf16, GPUS[name].bandwidth)


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


def test_the_largest_batch_stops_at_a_ranks_part_of_an_update():
    plan = paper("pretraining", gpus(8, "a100-80g"))
    assert (plan.global_batch_size, plan.rows_of_a_rank) == (8, 1)
    assert [largest_batch(plan.training, plan.machines, most) for most in (1, 3)] == [1, 3]
    assert largest_batch(plan.training, replace(plan.machines, memory=20 * GIB), 1) == 0
    found = largest_batch(plan.training, plan.machines, 1000)
    totals = [plan_memory(replace(plan.training, rows=rows)).total * 1.1 / GIB for rows in (found, found + 1)]
    assert totals[0] <= 80 < totals[1]


def test_blocks_are_full_however_short_their_documents_are():
    amount = Amount(rows=100, tokens=1e5, trained=1e5, longest=30, source="")
    assert paper("pretraining", gpus(8, "a100-80g"), amount=amount).training.length == 1024
    assert paper("sft", gpus(8, "a100-80g"), amount=amount).training.length == 30


def test_the_demo_fits_a_machine_of_8_gib():
    experiment = load_experiment(ROOT / "configs/demo.json")
    architecture = replace(read_architecture(BAICHUAN), hidden=128, layers=4, heads=4, kv_heads=4, head_dim=32,
                           intermediate=384, vocabulary=1280)  # fmt: skip
    for stage in STAGES:
        assert plan_stage(experiment, stage, architecture, Machines(1, 2, 3 * GIB, None)).verdict == "fits"


# ------------------------------------------------------------------------------------------------------------ time

EIGHT = gpus(8, "a100-80g")


def amount_of(stage: str, **numbers: float) -> Amount:
    given = {"rows": None, "tokens": None} | numbers
    return stated_amount(load_experiment(ROOT / "configs/qilin_med_7b.json"), stage, **given)


CPT = paper("pretraining", EIGHT, amount=amount_of("pretraining", tokens=2.122e9))


def test_a_ring_over_8_ranks_moves_7_eighths_once_or_twice():
    nvlink, pcie = GPUS["a100-80g"].bandwidth, GPUS["4090-24g"].bandwidth
    assert ring_seconds(14e9, 8, nvlink, 2) == pytest.approx(0.1065, abs=1e-4)  # 2 x 7/8 x 14 GB at 230 GB/s
    assert ring_seconds(14e9, 8, nvlink, 1) == pytest.approx(0.0533, abs=1e-4)
    assert ring_seconds(14e9, 8, pcie, 2) + ring_seconds(14e9, 8, pcie, 1) == pytest.approx(1.8375)
    assert ring_seconds(14e9, 1, pcie, 2) == 0


@pytest.mark.parametrize(
    ("engine", "accumulation", "sent"),
    [
        (Engine(True, 2, buckets=2), 1, Exchange(backward=2, after=1)),
        (Engine(True, 2, buckets=2), 4, Exchange(backward=8, after=1)),
        (Engine(True, 2, buckets=1), 4, Exchange(after=9)),
        (Engine(True, 1, buckets=2), 4, Exchange(backward=2, after=1)),
        (Engine(True, 0), 4, Exchange(after=2)),
        (Engine(True, 3), 4, Exchange(forward=4, backward=8)),
        (Engine(False, 0), 4, Exchange(backward=4)),  # fp32 gradients
    ],
)
def test_what_is_sent_by_stage_of_zero(engine, accumulation, sent):
    """In passes of the bf16 weights around the ring."""
    once = 7 / 8 * 2 * 7_000_559_616
    found = exchange(training(engine=engine, ranks=8), accumulation, bandwidth=once)
    assert (found.forward, found.backward, found.after) == pytest.approx((sent.forward, sent.backward, sent.after))


def test_model_flops_are_palms_whatever_is_recomputed():
    per_token = 6 * (32 * 202_375_168 + 64_000 * 4096) + 12 * 32 * 4096 * 1024  # 6 N + 12 L d T
    for changes in ({}, {"checkpointing": True}, {"attention": "flash_attention_2"}):
        assert model_flops(training(**changes), Work(1, 1)) == per_token
    adapters = 4 * (32 * 202_375_168 + 64_000 * 4096) + 6 * 19_988_480 + 12 * 32 * 4096 * 1024
    assert model_flops(training(lora=LORA), Work(1, 1)) == adapters


def test_the_papers_pretraining_at_the_best_published_rate_and_at_our_estimate():
    assert CPT.updates == 777_102
    published = at_mfu(CPT, CPT.flops(model_flops), PUBLISHED_MFU) / 3600
    assert published == pytest.approx(3 * 2.122e9 / (8 * 4357) / 3600, rel=1e-3)
    assert published == pytest.approx(50.7, abs=0.05)
    time = stage_duration(CPT, Rates(efficiency=0.5, disk=2e9))
    assert time.checkpoints == 73 and time.writing == pytest.approx(73 * 56, rel=1e-3)  # 112 GB an hour
    assert time.writing / time.total < 0.02
    assert time.compute == pytest.approx(CPT.flops() / (8 * 312e12 * 0.5))
    assert time.waiting == pytest.approx(777_102 * ring_seconds(2 * 7_000_559_616, 8, 230e9, 1))  # the weights' gather
    mfu, hfu = utilisation(CPT, time.total)
    assert mfu == pytest.approx(PUBLISHED_MFU * published * 3600 / time.total) and mfu < hfu < 0.5
    assert stage_duration(CPT, Rates(0.5, 2e9, mfu=PUBLISHED_MFU)).total == pytest.approx(published * 3600)


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
        "largest batch that fits: 1, a rank's part of an update",
        "777,102 updates, 6,366,000,000 tokens",
        "23,007 updates",
        "188 updates",
        "; 50.7 hours (2.11 days) at the best published MFU",
        "all stages: ",
    ):
        assert words in said, said
    said = subprocess.check_output(
        [*command, "--stage", "sft", "--gpu", "910b-64g", "--mfu", "0.4"], cwd=ROOT, text=True
    )
    assert said.startswith("910b-64g: for planning only") and "s at an MFU of 40.0%, as stated" in said


def test_gradients_are_waited_for_where_they_travel_longer_than_the_backward_pass():
    slow = replace(CPT, machines=replace(EIGHT, bandwidth=20e9))
    reduced, gathered = (ring_seconds(2 * 7_000_559_616, 8, 20e9, passes) for passes in (2, 1))
    time = stage_duration(slow, Rates(0.5, 2e9))
    hidden = reduced + gathered - time.waiting / 777_102
    assert hidden == pytest.approx(2 / 3 * time.compute / 777_102, rel=0.02)  # the backward pass


def test_sft_counts_conversations_and_padding_only_where_there_is_some():
    amount = amount_of("sft", rows=11_779_500, tokens=4.816e9)  # Table 2
    for packing, tokens in (("true", 4.816e9), ("false", 11_779_500 * 512)):
        plan = paper("sft", EIGHT, f"sft.packing={packing}", amount=amount)
        assert (plan.updates, plan.training.length, plan.work().tokens) == (23_007, 512, tokens)


def test_a_checkpoint_is_due_by_either_interval():
    assert checkpoint_bytes(CPT.training) == 16 * 7_000_559_616  # 112 GB: 56 s at 2 GB/s
    day = 86_400
    assert count_checkpoints(30, None, updates=5000, seconds=day) == 1 + 48
    assert count_checkpoints(30, 1000, updates=5000, seconds=day) == 1 + 48
    assert count_checkpoints(30, 50, updates=5000, seconds=day) == 1 + 100
    assert count_checkpoints(None, 1000, updates=777_102, seconds=day) == 1 + 777
    assert count_checkpoints(None, None, updates=5000, seconds=day) == 1


# ------------------------------------------------------------------------------------------------ measured, real runs


def measured(planned: Training, path: Path) -> float:
    """By how much this process grows in two updates with AdamW, model included."""
    update(
        model_on("cpu", path, torch.float32, planned.lora), replace(planned, rows=1, length=8)
    )  # loads the libraries
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that stay with the process would hide growth
    before = _memory("VmRSS")
    model = model_on("cpu", path, torch.float32, planned.lora)
    if planned.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(2):
        update(model, planned)
        optimizer.step()
        optimizer.zero_grad()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"lora": LORA}], ids=["cpt", "cpt recomputed", "sft"])
def test_memory_of_small_real_runs(tmp_path, monkeypatch, changes):
    """Within 15%: the libraries' scratch memory is in the measurement alone."""
    config = json.loads(BAICHUAN.read_text())
    small = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | small | {"num_hidden_layers": 6}))
    planned = training(tmp_path, dtype="float32", on_gpu=False, length=256, rows=4, **changes)
    memory = plan_memory(planned)
    # In a process where glibc hands every freed tensor back: else its heap keeps up to half as much again in pieces.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "1000000")
    with multiprocessing.get_context("spawn").Pool(1) as process:
        found = process.apply(measured, (planned, tmp_path))
    print(f"{(memory.total - memory.other) / found - 1:+.1%} of {found / 2**20:.0f} MiB ({memory.moment})")
    assert memory.total - memory.other == pytest.approx(found, rel=0.15)
