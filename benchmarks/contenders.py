"""The ways to train that `benchmark.py train` compares; each trains one model on the rows of one job.

A contender takes a Job and a Window, and tells the window when a step has ended. "bare" is what hardware and PyTorch give
without any Trainer; "predecessor" is how such scripts are usually written: rows padded to the longest, logits of every
position, and for DPO a second, frozen model. Sizes, seed, optimizer, adapter and number format are the same for all;
whatever else a library turns on by default (activation checkpointing, above all) stays on.
"""

import contextlib
import importlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qilin_med.data.rows import open_rows
from qilin_med.model.batches import Collator, model_inputs
from qilin_med.model.load import add_adapter, load_model, load_tokenizer, lora_config
from qilin_med.model.losses import unwrap
from qilin_med.prompt.template import IGNORED
from qilin_med.train.callbacks import MetricsFile
from qilin_med.train.job import Job
from qilin_med.train.trainers import PreferenceTrainer

POSITIONS_PER_CHUNK = 256  # of the bare loop's loss: logits of 64 MiB with a vocabulary of 64k in fp32
SCRIPTS = {"pretraining": "pretraining", "sft": "supervised_finetuning", "dpo": "dpo_training"}


def process_memory(name: str) -> int:
    """Bytes that this process holds ("VmRSS") or has held at most ("VmHWM"), files mapped into it included."""
    # getrusage's ru_maxrss would not do: a child inherits the peak of the process that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@dataclass
class Window:
    """Times optimizer steps: from the end of the last warm-up step to the end of the last one of all."""

    warmup: int
    items: list[int] = field(default_factory=list)  # useful tokens (or pairs) of each batch, in the order of making
    ended: list[float] = field(default_factory=list)  # when each step ended
    reference: float = 0.0  # seconds a pair of a reference pass made before the first step
    memory: int = 0  # peak, in bytes

    def step_ended(self) -> None:
        self.ended.append(time.perf_counter())
        self.memory = process_memory("VmHWM")

    def results(self) -> dict[str, Any]:
        """The rate is items a second; a reference pass is shared out among its pairs."""
        items, seconds = sum(self.items[self.warmup : len(self.ended)]), self.ended[-1] - self.ended[self.warmup - 1]
        rate, steps = 1 / (seconds / items + self.reference), len(self.ended) - self.warmup
        return {"rate": rate, "steps": steps, "items": items, "seconds": seconds, "reference_pass": self.reference}


def count_items(rows: list[dict]) -> int:
    """Pairs, or else tokens."""
    return sum("chosen_ids" in row or len(row.get("input_ids", ())) for row in rows)


def train(trainer: Trainer, window: Window) -> None:
    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            window.step_ended()
            control.should_save = False  # the last checkpoint is no part of training speed

    collate = trainer.data_collator

    def counted(rows: list[dict]) -> Any:
        window.items.append(count_items(rows))
        return collate(rows)

    trainer.data_collator = counted
    trainer.add_callback(Clock())
    trainer.train()


# ------------------------------------------------------------------------------------------------ ours, and by hand


def train_ours(job: Job, window: Window) -> None:
    """the stage script's trainer"""
    compute_reference = PreferenceTrainer._compute_reference

    def timed(self: Any, store: Any, missing: Any) -> None:
        start = time.perf_counter()
        compute_reference(self, store, missing)
        window.reference = (time.perf_counter() - start) / len(missing)
        window.items.clear()  # its batches are none of training's

    PreferenceTrainer._compute_reference = timed
    trainer = importlib.import_module(SCRIPTS[job.stage]).build_trainer(job)
    trainer.add_callback(MetricsFile(job.folder / "metrics.jsonl"))
    train(trainer, window)


def train_bare(job: Job, window: Window) -> None:
    """PyTorch alone, packed rows, logits at targets only, no activation checkpointing"""
    model, rows, section = adapted_model(job).train(), open_rows(job.rows).dataset, job.section
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=section.learning_rate, weight_decay=0.0, fused=True)
    packing = getattr(section, "packing", False)
    collate = Collator(packing, varlen=False, hidden_size=model.config.hidden_size)
    for indices in torch.randperm(len(rows)).split(section.batch_size_per_device):
        batch = [{**rows[i], "index": i} for i in indices.tolist()]
        window.items.append(count_items(batch))
        bare_loss(unwrap(model), collate(batch)).backward()
        torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        window.step_ended()


def bare_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """The mean loss over the batch's targets."""
    hidden = model.model(**model_inputs(batch), use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    scored = targets != IGNORED
    # The head is applied inside, chunk by chunk.
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=POSITIONS_PER_CHUNK)
    inputs = hidden[:, :-1][scored], model.lm_head.weight, targets[scored]
    return F.linear_cross_entropy(*inputs, reduction="sum", options=options) / scored.sum()


# ---------------------------------------------------------------------------------------------- other libraries'


def plain_model(job: Job) -> PreTrainedModel:
    return load_model(job.parent, job.experiment.model, torch.float32)


def adapted_model(job: Job) -> torch.nn.Module:
    model = plain_model(job)
    set_seed(job.experiment.seed)
    return add_adapter(model, job.section, job.experiment.seed) if job.section.lora else model


def arguments_for(job: Job, kind: type[TrainingArguments], **extra: Any) -> TrainingArguments:
    """What a comparison on one CPU needs to be the same; all else stays as the library has it."""
    return kind(
        output_dir=str(job.checkpoints),
        seed=job.experiment.seed,
        max_steps=job.schedule.steps,  # an epoch; of packed rows, several
        per_device_train_batch_size=job.section.batch_size_per_device,
        learning_rate=job.section.learning_rate,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **extra,
    )


def whole_rows(job: Job) -> Dataset:
    """`input_ids` and `labels` of one conversation (or one block) each."""
    rows, labels = open_rows(job.rows).dataset, "labels" if job.stage == "sft" else "input_ids"
    return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows[labels]})


def trl_options(job: Job) -> dict[str, Any]:
    tokenizer = load_tokenizer(job.parent, job.experiment.model.template)
    adapter = lora_config(job.section.lora) if job.section.lora else None
    return {"model": plain_model(job), "processing_class": tokenizer, "peft_config": adapter}


def train_trl(job: Job, window: Window, packing: bool = False) -> None:
    """its defaults: padded to the longest, activation checkpointing"""
    section = job.section
    length = section.max_source_length + section.max_target_length if job.stage == "sft" else section.block_size
    arguments = arguments_for(job, SFTConfig, max_length=length, packing=packing)
    train(SFTTrainer(args=arguments, train_dataset=whole_rows(job), **trl_options(job)), window)


def train_trl_packing(job: Job, window: Window) -> None:
    """its defaults: best-fit rows flattened to one line, activation checkpointing"""
    train_trl(job, window, packing=True)


class TokenDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokens already; DPOTrainer would tokenise texts."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def train_trl_dpo(job: Job, window: Window) -> None:
    """its defaults: reference pass in the step, no dropout, activation checkpointing"""
    arguments = arguments_for(job, DPOConfig, beta=job.section.beta)
    rows = open_rows(job.rows).dataset.remove_columns("ids")
    train(TokenDPOTrainer(args=arguments, train_dataset=rows, **trl_options(job)), window)


def train_predecessor(job: Job, window: Window) -> None:
    """transformers' Trainer: padded to the longest, all logits, activation checkpointing"""
    collator = DataCollatorForSeq2Seq(load_tokenizer(job.parent, job.experiment.model.template))
    arguments = arguments_for(job, TrainingArguments, activation_checkpointing=True)
    train(Trainer(adapted_model(job), arguments, collator, whole_rows(job)), window)


class TwoModelTrainer(Trainer):
    """DPO as scripts of 2023 ran it: policy and a frozen copy side by side, log-softmax over the whole vocabulary."""

    reference: PreTrainedModel
    beta: float

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        chosen, rejected = self.log_probs(model, inputs).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = self.log_probs(self.reference, inputs).chunk(2)
        return -F.logsigmoid(self.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()

    @staticmethod
    def log_probs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        targets = inputs["labels"][:, 1:]
        picked = logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return (picked * (targets != IGNORED)).sum(1)


def train_two_models(job: Job, window: Window) -> None:
    """transformers' Trainer: policy and frozen copy, all logits, activation checkpointing"""
    collator = DataCollatorForSeq2Seq(load_tokenizer(job.parent, job.experiment.model.template))

    def pad(rows: list[dict]) -> dict[str, torch.Tensor]:  # [2B, T]: the chosen sequences, then the rejected ones
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        return collator([{"input_ids": p + answer, "labels": [IGNORED] * len(p) + answer} for p, answer in pairs])

    arguments = arguments_for(job, TrainingArguments, activation_checkpointing=True, remove_unused_columns=False)
    reference = plain_model(job).eval().requires_grad_(False)
    trainer = TwoModelTrainer(adapted_model(job), arguments, pad, open_rows(job.rows).dataset)
    trainer.reference, trainer.beta = reference, job.section.beta
    train(trainer, window)


CONTENDERS: dict[str, dict[str, Callable[[Job, Window], None]]] = {
    "pretraining": {
        "ours": train_ours,
        "bare loop": train_bare,
        "TRL SFTTrainer": train_trl,
        "predecessor": train_predecessor,
    },
    "sft": {
        "ours": train_ours,
        "bare loop": train_bare,
        "TRL SFTTrainer": train_trl,
        "TRL SFTTrainer, packing": train_trl_packing,
        "predecessor": train_predecessor,
    },
    "dpo": {"ours": train_ours, "TRL DPOTrainer": train_trl_dpo, "two models": train_two_models},
}
"""By stage. Their docstrings say in the table how they run."""


def measure(job: Job, contender: str, warmup: int) -> dict[str, Any]:
    """One contender's rate and memory; to be called in a process of its own."""
    before = process_memory("VmRSS")  # everything is imported, no model is loaded
    window, silence = Window(warmup), io.StringIO()
    with (
        tempfile.TemporaryDirectory(dir=job.rows.parent) as copied,
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        # A copy, as libraries keep what they computed (a reference pass) beside the rows and would find it next time.
        rows = shutil.copytree(job.rows, Path(copied) / "rows")
        set_seed(job.experiment.seed)
        CONTENDERS[job.stage][contender](replace(job, rows=rows), window)
    return {**window.results(), "memory": window.memory - before, "threads": torch.get_num_threads()}
