"""The three stages as a user runs them: whole, killed, resumed, split, refused.

Every run here is the real script in its own processes, two ranks under ZeRO-2 unless a test says otherwise; where only the
numbers matter, ranks are forked (see forked.py) or trained in this process.
"""

import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch
from flash_stand_in import flash_on_cpu
from forked import SCRIPTS, free_port, run_stage
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from qilin_med.artifact import MANIFEST, verify_folder
from qilin_med.config.experiment import load_experiment
from qilin_med.data.rows import open_rows
from qilin_med.errors import UserError
from qilin_med.launch.agent import count_ranks
from qilin_med.train.checkpoints import COMPLETE, find_checkpoints, step_of
from qilin_med.train.job import Job
from qilin_med.train.metrics import trained_on
from qilin_med.train.stage import prepare_job

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["发热", "头痛", "咳嗽", "乏力", "血压", "饮食", "休息", "药", "医生", "复查"]


def sentence(source: random.Random, words: int) -> str:
    return "".join(source.choice(WORDS) for _ in range(words)) + "。"


@pytest.fixture(scope="session")
def world(tmp_path_factory, small_tokenizer) -> Path:
    """A folder with a tiny base model, data for three stages and an experiment file."""
    folder, source = tmp_path_factory.mktemp("world"), random.Random(0)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(small_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ).save_pretrained(folder / "base")  # fmt: skip
    small_tokenizer.save_pretrained(folder / "base")
    texts = [sentence(source, source.randint(3, 30)) for _ in range(120)]
    (folder / "cpt.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    chats = [
        {"conversations": [{"from": "input", "value": sentence(source, 4)}, {"from": "output", "value": answer}]}
        for answer in texts[:85]
    ]
    pairs = [
        {"question": sentence(source, 4), "response_chosen": good, "response_rejected": sentence(source, 2)}
        for good in texts[:85]
    ]
    for name, rows in (("sft", chats), ("dpo", pairs)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    common = {
        "epochs": 1, "batch_size_per_device": 4, "learning_rate": 1e-2, "warmup_ratio": 0.1, "weight_decay": 0.01,
        "checkpoint_every": 3, "deepspeed": "configs/deepspeed/zero2.json", "report_to": [],
    }  # fmt: skip
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    instruct = common | {"max_source_length": 24, "max_target_length": 40, "lora": lora}
    experiment = {
        "name": "test", "seed": 5, "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "base"), "template": "qilin", "dtype": "float32"},
        "launch": {"device": "cpu", "processes": 2},
        "pretraining": common | {"data": [str(folder / "cpt.txt")], "block_size": 32},
        "sft": instruct | {"data": [str(folder / "sft.jsonl")]},
        "dpo": instruct | {"data": [str(folder / "dpo.jsonl")], "beta": 0.1},
    }  # fmt: skip
    (folder / "c.json").write_text(json.dumps(experiment), encoding="utf-8")
    return folder


def start(world: Path, stage: str, *arguments: str, environment: dict | None = None) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / SCRIPTS[stage]), "--config", str(world / "c.json"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, **pipes)


def run(world: Path, stage: str, *arguments: str, code: int = 0, environment: dict | None = None) -> str:
    process = start(world, stage, *arguments, environment=environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="session")
def finished(world) -> Path:
    """The run folder after all three stages, uninterrupted."""
    for stage in SCRIPTS:
        run(world, stage)
    return world / "run"


def test_each_stage_hands_over_a_complete_folder(finished):
    for stage in SCRIPTS:
        manifest = verify_folder(finished / stage / "merged")
        assert manifest["stage"] == stage
        assert manifest["parent"]["fingerprint"]
        AutoModelForCausalLM.from_pretrained(finished / stage / "merged")
        tokenizer = AutoTokenizer.from_pretrained(finished / stage / "merged")
        assert "generation" in tokenizer.chat_template
    parents = [verify_folder(finished / stage / "merged")["parent"]["fingerprint"] for stage in ("sft", "dpo")]
    made = [verify_folder(finished / stage / "merged")["fingerprint"] for stage in ("pretraining", "sft")]
    assert parents == made


def test_training_lowers_the_loss_and_dpo_starts_at_ln_2(finished):
    for stage in SCRIPTS:
        course = losses(finished / stage)
        assert course[-1] < course[0]
    first = metrics(finished / "dpo")[0]
    assert math.isclose(first["loss"], math.log(2), abs_tol=1e-6)
    # The reference was computed in batches of another composition, so up to fp32's rounding of sums near 100.
    assert abs(first["rewards/chosen"]) < 1e-6 and abs(first["rewards/rejected"]) < 1e-6
    assert metrics(finished / "dpo")[-1]["rewards/accuracy"] > 0.5


def test_merged_equals_parent_with_adapter(finished):
    from peft import PeftModel

    ids = torch.arange(4, 40).unsqueeze(0)
    for stage, parent in (("sft", "pretraining"), ("dpo", "sft")):
        base = AutoModelForCausalLM.from_pretrained(finished / parent / "merged")
        adapted = PeftModel.from_pretrained(base, finished / stage / "adapter").eval()
        merged = AutoModelForCausalLM.from_pretrained(finished / stage / "merged").eval()
        with torch.no_grad():
            adapter_logits, merged_logits = adapted(ids).logits, merged(ids).logits
            with adapted.disable_adapter():
                parent_logits = adapted(ids).logits
        torch.testing.assert_close(merged_logits, adapter_logits, rtol=0, atol=1e-4)
        assert (merged_logits - parent_logits).abs().max() > 1e-2


def test_cached_reference_equals_a_frozen_copy(world, finished):
    """The log-probabilities cached beside the rows, against the SFT model's own, computed without any of our code."""
    from qilin_med.train.reference_log_probs import ReferenceLogProbs

    job = Job.load(finished / "dpo" / "job.json")
    rows, store = open_rows(job.rows).dataset, ReferenceLogProbs(job)
    cached = store.read()
    assert cached.shape == (len(rows), 2)
    model = AutoModelForCausalLM.from_pretrained(finished / "sft" / "merged").eval()
    for index in range(0, len(rows), 9):
        row = rows[index]
        for column, side in enumerate(("chosen", "rejected")):
            answer = row[f"{side}_ids"]
            ids = torch.tensor([row["prompt_ids"] + answer])
            with torch.no_grad():
                log_probs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
            by_hand = log_probs[-len(answer) :].gather(1, torch.tensor(answer).unsqueeze(1)).sum().item()
            assert math.isclose(cached[index, column], by_hand, abs_tol=1e-3)


def test_a_stage_says_what_it_trained_on(finished):
    """In one epoch on all of its rows; a pair's prompt is read with either answer."""
    for stage in SCRIPTS:
        manifest = verify_folder(finished / stage / "merged")
        counts, rows = manifest["data"]["counts"], open_rows(Job.load(finished / stage / "job.json").rows).dataset
        prompts = sum(map(len, rows["prompt_ids"])) if stage == "dpo" else 0
        assert manifest["trained"] == {
            "optimizer_steps": len(metrics(finished / stage)), "samples": counts["rows"], "epochs": 1.0,
            "tokens": counts["tokens"] + prompts, "loss_tokens": counts["trained_tokens"],
        }  # fmt: skip
        assert manifest["overrides"] == []


def test_a_short_run_claims_no_more_than_it_did(world, finished):
    trainer = trainer_here(world, "sft", ["sft.max_steps=3"])
    trained(trainer)
    rows = trainer.train_dataset[trainer.step_sampler.order(0)[:12]]
    found = trained_on(metrics(trainer.job.folder), trainer.job.schedule)
    assert found == {
        "optimizer_steps": 3, "samples": 12, "tokens": sum(map(len, rows["input_ids"])), "epochs": 12 / 85,
        "loss_tokens": sum(label != -100 for labels in rows["labels"] for label in labels),
    }  # fmt: skip
    assert trained_on(metrics(trainer.job.folder)[:2], trainer.job.schedule) is None


def test_running_again_is_safe(world, finished):
    before = (finished / "sft" / "merged" / "model.safetensors").stat().st_mtime_ns
    assert "already finished" in run(world, "sft")
    refused = run(world, "sft", "sft.lora.alpha=16", code=2)
    assert "sft.lora.alpha: 8 -> 16" in refused and "--restart" in refused
    assert "Traceback" not in refused
    assert (finished / "sft" / "merged" / "model.safetensors").stat().st_mtime_ns == before


def kill_when(process: subprocess.Popen, condition, number: int = signal.SIGKILL) -> bool:
    """Send a signal to the launcher as soon as the condition holds; False if the process ended before."""
    while process.poll() is None:
        if condition():
            process.send_signal(number)
            process.communicate(timeout=120)
            return True
        time.sleep(0.0005)
    process.communicate()
    return False


def steps_of(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def half_written_checkpoint(folder: Path) -> bool:
    return any(not (path / COMPLETE).exists() for path in find_checkpoints(folder / "checkpoints"))


@pytest.mark.parametrize(
    ("stage", "moments"),
    [("pretraining", ["step", "checkpoint", "merge"]), ("sft", ["step", "merge"]), ("dpo", ["step"])],
)
def test_killed_anywhere_ends_like_an_uninterrupted_run(world, finished, stage, moments, tmp_path):
    parent = {"sft": "pretraining", "dpo": "sft"}.get(stage)
    arguments = [f"output_dir={tmp_path}/run"]
    if parent:
        arguments.append(f"{stage}.parent={finished / parent / 'merged'}")
    folder = tmp_path / "run" / stage
    step = random.SystemRandom().randint(1, 8)
    reached = {
        "step": lambda: len(steps_of(folder)) >= step,
        "checkpoint": lambda: half_written_checkpoint(folder),
        "merge": lambda: (folder / "merged.work").exists(),
    }
    print(f"killed at step {step}")  # pytest shows it if the test fails
    for moment in moments:
        killed = kill_when(start(world, stage, *arguments), reached[moment])
        assert killed or moment == "checkpoint"  # which is half-written for a moment only
        assert not killed or not (folder / "merged").exists()
    run(world, stage, *arguments)
    assert losses(folder) == losses(finished / stage)  # bitwise: fp32 on a CPU
    ours, theirs = (load_file(path / stage / "merged" / "model.safetensors") for path in (tmp_path / "run", finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    manifest = verify_folder(folder / "merged")
    assert manifest["trained"] == verify_folder(finished / stage / "merged")["trained"]
    assert manifest["overrides"] == arguments


def test_sigterm_saves_a_checkpoint_first(world, finished, tmp_path):
    arguments = [f"output_dir={tmp_path}/run", "pretraining.checkpoint_every=1000"]
    folder = tmp_path / "run" / "pretraining"
    process = start(world, "pretraining", *arguments)
    kill_when(process, lambda: (folder / "metrics.jsonl").exists(), signal.SIGTERM)
    assert process.returncode == 130
    (checkpoint,) = find_checkpoints(folder / "checkpoints")
    verify_folder(checkpoint, COMPLETE)
    assert "continuing from" in run(world, "pretraining", *arguments)
    assert losses(folder) == losses(finished / "pretraining")


@pytest.mark.parametrize(
    ("moment", "last_line"),
    [
        ("start-up", "stopped by the user before the first checkpoint; run the same command to start again"),
        ("training", r"stopped by the user at step \d+ of 17; run the same command to continue"),
    ],
)
def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(world, tmp_path, moment, last_line):
    folder = tmp_path / "run" / "pretraining"
    process = start(world, "pretraining", f"output_dir={tmp_path}/run", "pretraining.checkpoint_every=1000")
    launcher, moments = psutil.Process(process.pid), {
        "start-up": lambda: len(launcher.children()) == 2,
        "training": lambda: (folder / "metrics.jsonl").exists(),
    }  # fmt: skip
    while not moments[moment]():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(last_line, output.splitlines()[-1]), output
    assert "Traceback" not in output and "Error" not in output


OWN = {
    "pretraining": "pretraining.weight_decay=0.01",
    "sft": "sft.parent={run}/pretraining/merged",
    "dpo": "dpo.parent={run}/sft/merged",
}


def trainer_here(world: Path, stage: str, overrides: list[str]):
    """A stage's trainer in this process, on one rank, without DeepSpeed, with metrics file and checkpoints."""
    from qilin_med.train.callbacks import Checkpoints, MetricsFile

    settings = [f"output_dir={world}/here", OWN[stage].format(run=world / "run"), f"{stage}.deepspeed=null"]
    job, *_ = prepare_job(load_experiment(world / "c.json", [*settings, *overrides]), stage, ranks=1)
    job.folder.mkdir(parents=True, exist_ok=True)
    trainer = importlib.import_module(SCRIPTS[stage].removesuffix(".py")).build_trainer(job)
    trainer.checkpoints = Checkpoints(job, trainer)
    trainer.add_callback(MetricsFile(job.folder / "metrics.jsonl"))
    trainer.add_callback(trainer.checkpoints)
    return trainer


def trained(trainer, checkpoint: Path | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and final weights."""
    set_seed(5)
    with trainer.checkpoints:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return torch.tensor(losses(trainer.job.folder)), weights


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "{port}"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}"],
    "srun": [],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_any_launcher_starts_a_stage(world, finished, tmp_path, launcher):
    """As everywhere in the ecosystem; srun is played by its variables."""
    parent = f"sft.parent={finished}/pretraining/merged"
    script = [SCRIPTS["sft"], "--config", str(world / "c.json"), f"output_dir={tmp_path}/run", parent]
    port = free_port()
    command = [sys.executable, *(part.format(port=port) for part in LAUNCHERS[launcher]), *script]
    tasks = [{}]
    if launcher == "srun":
        numbers = ({"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2))
        tasks = [SLURM | {"MASTER_PORT": str(port)} | own for own in numbers]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, **task}, **pipes) for task in tasks]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(tasks), outputs
    assert losses(tmp_path / "run" / "sft") == losses(finished / "sft")
    verify_folder(tmp_path / "run" / "sft" / "merged")
    if (
        launcher == "srun"
    ):  # a finished stage ends well on every rank, though rank 0, which has the store, leaves at once
        run_stage(world / "c.json", "sft", f"output_dir={tmp_path}/run", parent, "launch.processes=2")
    if launcher == "torchrun":  # an error is one line beside torchrun's own page
        refused = subprocess.run([*command, "sft.learning_rate=1"], cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 1
        [line] = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        assert "sft.learning_rate: 0.01 -> 1" in line


@pytest.mark.parametrize("stage", SCRIPTS)
def test_no_layout_changes_the_training(world, finished, stage, tmp_path):
    """Ranks, accumulation, packing and FlashAttention decide how a step is computed, never what it is."""

    def settings(name: str, batch: int, *more: str) -> list[str]:
        dropout = [f"{stage}.lora.dropout=0"] * (stage != "pretraining")
        return [
            f"output_dir={tmp_path}/{name}", f"{stage}.batch_size_per_device={batch}", f"{stage}.global_batch_size=8",
            f"{stage}.max_steps=12", *dropout, *more,
        ]  # fmt: skip

    # 85 chats and pairs: the eleventh step is smaller, the twelfth is in the second epoch
    expected, weights = trained(trainer_here(world, stage, settings("whole", 8)))
    unpacked = [f"{stage}.packing=false"] * (stage != "pretraining")
    for name, batch, flash, more in (("1x1", 1, False, []), ("2", 2, True, []), ("unpacked", 4, False, unpacked),
                                     ("unpacked flash", 4, True, unpacked)):  # fmt: skip
        trainer = trainer_here(world, stage, settings(name, batch, *more))
        trainer.data_collator = replace(trainer.data_collator, varlen=flash)
        with flash_on_cpu(trainer.model) if flash else nullcontext():
            found, found_weights = trained(trainer)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(found_weights[key], weight, rtol=0, atol=1e-3)
    ranks = [OWN[stage].format(run=finished), f"{stage}.deepspeed=null", "launch.processes=2"]
    run_stage(world / "c.json", stage, *settings("2x4", 4), *ranks)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "2x4" / stage)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_resume_in_any_epoch_is_bitwise(world, finished, stage, tmp_path):
    settings = [
        f"output_dir={tmp_path}", f"{stage}.epochs=3", f"{stage}.global_batch_size=16", f"{stage}.checkpoint_every=1",
        f"{stage}.keep_checkpoints=99",
    ]  # fmt: skip
    expected, weights = trained(trainer_here(world, stage, settings))
    per_epoch = len(expected) // 3
    assert len(expected) == 3 * per_epoch and per_epoch > 2
    for step in (per_epoch + 1, 2 * per_epoch, 3 * per_epoch - 1):  # in the second epoch, at its end, in the third
        checkpoint = tmp_path / stage / f"checkpoints/checkpoint-{step}"
        found, found_weights = trained(trainer_here(world, stage, settings), checkpoint)
        assert torch.equal(found, expected)
        assert all(torch.equal(found_weights[name], weight) for name, weight in weights.items())


def test_the_reference_is_computed_for_the_pairs_that_are_used_and_only_once(world, finished, tmp_path, capsys):
    from qilin_med.train.reference_log_probs import ReferenceLogProbs

    few = trainer_here(world, "dpo", [f"output_dir={tmp_path}", "dpo.max_steps=2", "dpo.batch_size_per_device=8"])
    counted = []
    compute = type(few)._compute_reference

    def count(self, store, missing):
        counted.append(len(missing))
        compute(self, store, missing)

    with mock.patch.object(type(few), "_compute_reference", count):
        trained(few)
        store = ReferenceLogProbs(few.job)
        assert counted == [16] and (~torch.tensor(store.read()).isnan()).sum() == 32
        # more steps need more pairs; a file that is damaged is computed again
        more = [f"output_dir={tmp_path}", "dpo.max_steps=3", "dpo.batch_size_per_device=8"]
        trained(trainer_here(world, "dpo", more))
        assert counted == [16, 8]
        flip_a_byte(store.path)
        trained(trainer_here(world, "dpo", more))
        assert counted == [16, 8, 24] and "damaged" in capsys.readouterr().out
        trained(trainer_here(world, "dpo", more))
        assert counted == [16, 8, 24]
    # killed in the middle: what was saved until then counts
    store.path.unlink()
    with (
        mock.patch("qilin_med.train.reference_log_probs._SECONDS_BETWEEN_SAVES", 0),
        mock.patch.object(type(few), "_reference_batches", lambda self, missing: [missing[:8].tolist()]),
    ):
        few.begin()
    assert (~torch.tensor(ReferenceLogProbs(few.job).read()).isnan()).sum() == 16


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_parent_is_named_and_refused(world, finished, tmp_path):
    parent = shutil.copytree(finished / "pretraining" / "merged", tmp_path / "merged")
    flip_a_byte(parent / "model.safetensors")
    arguments = (f"output_dir={tmp_path}/run", f"sft.parent={parent}")
    assert "merged/model.safetensors: contents changed" in run(world, "sft", *arguments, code=2)
    os.truncate(parent / "model.safetensors", 1000)
    assert "1000 bytes, expected" in run(world, "sft", *arguments, code=2)
    (parent / MANIFEST).unlink()
    (parent / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in run(world, "sft", *arguments, code=2)


def test_a_damaged_or_foreign_checkpoint_is_skipped(world, finished, tmp_path):
    arguments = [f"output_dir={tmp_path}/run"]
    folder = tmp_path / "run" / "pretraining"
    newest = folder / "checkpoints" / "checkpoint-6"
    assert kill_when(start(world, "pretraining", *arguments), (newest / COMPLETE).exists)
    flip_a_byte(next(newest.glob("global_step*/*rank_1*optim*")))
    shutil.copytree(finished / "sft" / "checkpoints" / "checkpoint-9", folder / "checkpoints" / "checkpoint-8")
    output = run(world, "pretraining", *arguments)
    assert "checkpoint-8: written by another run or stage" in output
    assert "contents changed" in output and "continuing from checkpoint-3" in output
    assert losses(folder) == losses(finished / "pretraining")
    names = {path.name.split("-2")[0] for path in (folder / "checkpoints").iterdir()}
    assert {"checkpoint-6.damaged", "checkpoint-8.foreign"} <= names


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=False)


def fill(disk: Path) -> None:
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(2**12))


def test_a_full_disk_destroys_nothing(world, finished, small_disk):
    arguments = [f"output_dir={small_disk}/run"]
    folder = small_disk / "run" / "pretraining"
    process = start(world, "pretraining", *arguments)
    while not (folder / "checkpoints" / "checkpoint-3" / COMPLETE).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    fill(small_disk)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "the disk is full" in output, output
    assert "Traceback" not in output
    (small_disk / "filler").unlink()
    assert "continuing from checkpoint-" in run(world, "pretraining", *arguments)
    assert losses(folder) == losses(finished / "pretraining")


def test_a_disk_that_fills_up_behind_the_training_is_told_of(world, small_disk):
    from transformers import TrainerControl, TrainerState

    from qilin_med.train.callbacks import Checkpoints, MetricsFile

    job, *_ = prepare_job(load_experiment(world / "c.json", [f"output_dir={small_disk}"]), "pretraining", ranks=1)
    checkpoint = job.checkpoints / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    metrics = job.folder / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    fill(small_disk)
    trainer = SimpleNamespace(stop_agreed=0, save_agreed=0)
    state, control = TrainerState(global_step=1), TrainerControl()
    with pytest.raises(UserError, match="the disk is full"), Checkpoints(job, trainer) as checkpoints:
        checkpoints.on_save(None, state, control)
    with pytest.raises(UserError, match="the disk is full"):
        checkpoints.on_step_end(None, TrainerState(global_step=2, max_steps=5), control)
    assert not (checkpoint / COMPLETE).exists()
    with pytest.raises(UserError, match="the disk is full"):
        MetricsFile(metrics).on_train_begin(None, state, control)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "lo'
    (small_disk / "filler").unlink()
    MetricsFile(metrics).on_train_begin(None, TrainerState(global_step=2), control)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_training_goes_on_while_a_checkpoint_is_committed(world, finished, tmp_path):
    """A pipe that nobody writes to, among the files of checkpoint-6, holds up its fsync as a slow disk would."""
    arguments = [f"output_dir={tmp_path}/run"]
    folder = tmp_path / "run" / "pretraining"
    process = start(world, "pretraining", *arguments)
    assert any(line.startswith("starting") for line in process.stdout)
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    checkpoint.mkdir(parents=True)
    os.mkfifo(checkpoint / "pipe")
    assert kill_when(process, lambda: len(steps_of(folder)) == 8)
    assert (checkpoint / "trainer_state.json").exists() and not (checkpoint / COMPLETE).exists()
    assert "continuing from checkpoint-3" in run(world, "pretraining", *arguments)
    assert losses(folder) == losses(finished / "pretraining")
    assert not list(folder.glob("checkpoints/*incomplete*"))


@pytest.mark.parametrize(
    ("minutes", "every", "saved"), [("1e-6", "null", [1, 2, 3, 4, 5]), ("null", "2", [2, 4, 5]), ("60", "null", [5])]
)
def test_checkpoints_by_the_clock_and_by_steps(world, tmp_path, minutes, every, saved):
    folder = run_stage(
        world / "c.json", "pretraining", f"output_dir={tmp_path}", "pretraining.deepspeed=null",
        "pretraining.max_steps=5", "pretraining.keep_checkpoints=9", f"pretraining.checkpoint_minutes={minutes}",
        f"pretraining.checkpoint_every={every}",
    )  # fmt: skip
    assert [step_of(path) for path in find_checkpoints(folder / "checkpoints")] == saved
    assert all((path / COMPLETE).exists() for path in find_checkpoints(folder / "checkpoints"))
    rows = metrics(folder)
    assert [row["step"] for row in rows if "checkpoint_seconds" in row] == saved
    assert all(row["checkpoint_seconds"] < row["seconds"] for row in rows if "checkpoint_seconds" in row)
    cost = verify_folder(folder / "merged")["checkpoints"]
    assert cost["number"] == len(saved) and 0 < cost["share"] < 1


def test_nan_stops_with_step_rows_and_last_good_checkpoint(world, finished, tmp_path):
    output = run(
        world, "sft", f"output_dir={tmp_path}/run", f"sft.parent={finished / 'pretraining' / 'merged'}",
        "sft.learning_rate=1e38", "sft.warmup_ratio=0.5", "sft.checkpoint_every=1", code=2,
    )  # fmt: skip
    assert "became" in output and "at step" in output and "sft.jsonl:" in output and "checkpoint-" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "sft" / "merged").exists()


def test_a_port_in_use_is_named(world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        output = run(world, "pretraining", f"output_dir={tmp_path}/run", code=2, environment={"MASTER_PORT": port})
    assert f"MASTER_PORT={port} cannot be used" in output


@pytest.mark.parametrize(
    ("stage", "override", "words"),
    [
        ("pretraining", "model.path=nowhere", "nowhere does not exist"),
        ("pretraining", "launch.device=cuda", "no GPU is visible"),
        ("pretraining", "pretraining.batch_size_per_device=500", "too few for one batch on each rank"),
        ("pretraining", "pretraining.global_batch_size=9", "does not divide"),
        ("pretraining", "pretraining.data=nothing.txt", "array"),
        ("sft", 'sft.data=["nothing.jsonl"]', "nothing.jsonl"),
        ("sft", "sft.parent={run}/sft/checkpoints/checkpoint-9", "not a whole model"),
        ("sft", "sft.parent={run}/nowhere", "does not exist"),
        ("sft", "sft.deepspeed=nowhere.json", "nowhere.json"),
        ("sft", 'sft.lora.target_modules=["nothing"]', "target_modules"),
        ("pretraining", "pretraining.block_size=200 pretraining.isolate_documents=false", "model has 128 positions"),
    ],
)
def test_what_a_user_can_mend_gets_one_line(world, finished, tmp_path, stage, override, words):
    if torch.cuda.is_available() and "cuda" in override:
        pytest.skip("there is a GPU here")
    overrides = [f"output_dir={tmp_path}/run", f"sft.parent={finished}/pretraining/merged"]
    overrides += override.format(run=finished).split(" ")
    with pytest.raises(UserError) as error:
        experiment = load_experiment(world / "c.json", overrides)
        job, *_ = prepare_job(experiment, stage, count_ranks(experiment.launch, torch.cuda.device_count()))
        job.identity()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_dry_run_tells_all_and_does_nothing(world, tmp_path):
    output = run(world, "pretraining", f"output_dir={tmp_path}/run", "--dry-run")
    [row] = [line.split() for line in output.splitlines() if line.startswith("pretraining  ")]
    counts, *_ = prepare_job(load_experiment(world / "c.json", [f"output_dir={tmp_path}/real"]), "pretraining", 2)
    tokens = json.loads((counts.rows / MANIFEST).read_text())["counts"]["tokens"]
    assert row[1:7] == ["base", "120", "0.0%", "-", str(counts.schedule.steps), f"{tokens:,}"]
    assert '"learning_rate": 0.01' in output and "trainable (100.00%)" in output
    assert f"{counts.schedule.rows} rows, {tokens:,} tokens (all records)" in output
    assert not (tmp_path / "run").exists()
