"""The ways to train that `benchmark.py train` compares; each trains one model on the rows of one job.

A contender takes a Job and a Window, and calls the window at every update. "bare" is what hardware and PyTorch give
without any Trainer; "predecessor" is how such scripts are usually written: rows padded to the longest, logits of every
position, and for DPO a second, frozen model. Sizes, seed, optimiser, adapter and number format are the same for all;
whatever else a library turns on by default (activation checkpointing, above all) stays on.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qilin_med.data.rows import open_rows
from qilin_med.model.batches import Layout, TokenCollator, model_inputs
from qilin_med.model.load import load_model, load_tokenizer, lora_config
from qilin_med.train.job import Job
from qilin_med.train.trainers import PreferenceTrainer

IGNORED = -100
POSITIONS_PER_CHUNK = 256  # of the bare loop's loss: logits of 64 MiB with a vocabulary of 64k in fp32


def peak_memory() -> int:
    """Bytes: the most that this process has held at once, files mapped into it included."""
    return _memory("VmHWM")


def current_memory() -> int:
    return _memory("VmRSS")


def _memory(name: str) -> int:
    # getrusage's ru_maxrss would not do: a child inherits the peak of the process that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@dataclass
class Window:
    """Times updates: the clocks run from the end of the last warm-up update to the end of the last one of all."""

    warmup: int
    items: list[int] = field(default_factory=list)
    """Useful tokens (or pairs) of each batch, in the order in which batches were made."""
    times: list[float] = field(default_factory=list)
    """When each update ended."""
    cpu_times: list[float] = field(default_factory=list)
    """The same by the process's own CPU clock, which others at work on the machine disturb less."""
    reference: dict[str, float] | None = None
    """Pairs, seconds and cpu_seconds of a reference pass made before the first update."""
    memory: int = 0

    def update_ended(self) -> None:
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
        self.memory = peak_memory()

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[self.warmup - 1]

    @property
    def cpu_seconds(self) -> float:
        return self.cpu_times[-1] - self.cpu_times[self.warmup - 1]

    @property
    def timed_items(self) -> int:
        return sum(self.items[self.warmup : len(self.times)])

    def rate(self, clock: str) -> float:
        """Items per second of "seconds" or "cpu_seconds"; a reference pass is shared out among its pairs."""
        seconds_per_item = getattr(self, clock) / self.timed_items
        if self.reference:
            seconds_per_item += self.reference[clock] / self.reference["pairs"]
        return 1 / seconds_per_item


class WindowCallback(TrainerCallback):
    def __init__(self, window: Window) -> None:
        self.window = window

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.window.update_ended()
        control.should_save = False  # the last checkpoint is no part of training speed


def _run(trainer: Trainer, window: Window, count: Callable[[list[dict]], int]) -> None:
    collate = trainer.data_collator

    def counted(rows: list[dict]) -> Any:
        window.items.append(count(rows))
        return collate(rows)

    trainer.data_collator = counted
    trainer.add_callback(WindowCallback(window))
    trainer.train()


def count_tokens(rows: list[dict]) -> int:
    return sum(len(row.get("input_ids", ())) for row in rows)


def count_pairs(rows: list[dict]) -> int:
    return sum("chosen_ids" in row for row in rows)


def _count(job: Job) -> Callable[[list[dict]], int]:
    return count_pairs if job.stage == "dpo" else count_tokens


# ---------------------------------------------------------------------------------------------------------- ours


def train_ours(job: Job, window: Window) -> None:
    """The stage script's own trainer, as a rank of a run builds it, with the callback that writes its metrics."""
    from qilin_med.train.callbacks import MetricsFile

    script = {"pretraining": "pretraining", "sft": "supervised_finetuning", "dpo": "dpo_training"}[job.stage]
    _time_reference_pass(window)
    trainer = importlib.import_module(script).build_trainer(job)
    trainer.add_callback(MetricsFile(job.folder / "metrics.jsonl"))
    _run(trainer, window, _count(job))


def _time_reference_pass(window: Window) -> None:
    original = PreferenceTrainer._compute_reference

    def timed(self: Any, store: Any, missing: Any) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        original(self, store, missing)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        window.reference = {"pairs": len(missing), "seconds": seconds, "cpu_seconds": cpu_seconds}
        window.items.clear()  # its batches are none of training's

    PreferenceTrainer._compute_reference = timed


# ---------------------------------------------------------------------------------------------------------- bare


def train_bare(job: Job, window: Window) -> None:
    """Plain PyTorch on our packed rows: no Trainer, no checkpointing, logits at target positions only."""
    model = _model(job).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.section.learning_rate, weight_decay=0.0, fused=True)
    packing = getattr(job.section, "packing", False)
    collate = TokenCollator(Layout(packing, varlen=False, hidden_size=model.config.hidden_size))
    for rows in _batches(job, window):
        batch = collate(rows)
        _backward(model, batch)
        torch.nn.utils.clip_grad_norm_(trained, job.section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        window.update_ended()


def _backward(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    """Gradients of the mean loss over the batch's targets."""
    causal = _causal_model(model)
    hidden = causal.model(**model_inputs(batch), use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    scored = targets != IGNORED
    hidden, targets = hidden[:, :-1][scored], targets[scored]
    # The head is applied inside, chunk by chunk.
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=POSITIONS_PER_CHUNK)
    total = F.linear_cross_entropy(hidden, causal.lm_head.weight, targets, reduction="sum", options=options)
    (total / len(targets)).backward()


def _batches(job: Job, window: Window) -> Iterator[list[dict]]:
    rows = open_rows(job.rows).dataset
    order = torch.randperm(len(rows)).tolist()
    size = job.section.batch_size_per_device
    for start in range(0, len(order), size):
        batch = [{**rows[i], "index": i} for i in order[start : start + size]]
        window.items.append(count_tokens(batch))
        yield batch


# ----------------------------------------------------------------------------------------------------------- TRL


def train_trl(job: Job, window: Window) -> None:
    """TRL's SFTTrainer with its defaults: rows in batches padded to the longest."""
    _train_sft_trainer(job, window, packing=False)


def train_trl_packing(job: Job, window: Window) -> None:
    """The same with packing=True: best-fit rows, flattened to one line of batch size x packed length."""
    _train_sft_trainer(job, window, packing=True)


def _train_sft_trainer(job: Job, window: Window, packing: bool) -> None:
    arguments = _arguments(job, SFTConfig, max_length=_row_length(job), packing=packing)
    trainer = SFTTrainer(
        model=load_model(job.parent, job.experiment.model, torch.float32),
        args=arguments,
        train_dataset=_whole_rows(job),
        processing_class=load_tokenizer(job.parent, job.experiment.model.template),
        peft_config=_lora(job),
    )
    _run(trainer, window, count_tokens)


class TokenDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokens already; DPOTrainer would tokenise texts."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def train_trl_dpo(job: Job, window: Window) -> None:
    """TRL's DPOTrainer with its defaults: the reference, the adapter switched off, runs in every step."""
    trainer = TokenDPOTrainer(
        model=load_model(job.parent, job.experiment.model, torch.float32),
        args=_arguments(job, DPOConfig, beta=job.section.beta),
        train_dataset=open_rows(job.rows).dataset.remove_columns("ids"),
        processing_class=load_tokenizer(job.parent, job.experiment.model.template),
        peft_config=_lora(job),
    )
    _run(trainer, window, count_pairs)


# --------------------------------------------------------------------------------------------------- predecessor


def train_predecessor(job: Job, window: Window) -> None:
    """transformers' Trainer as it comes: rows padded to the longest, logits of every position, checkpointing on."""
    tokenizer = load_tokenizer(job.parent, job.experiment.model.template)
    trainer = Trainer(
        model=_model(job),
        args=_arguments(job, TrainingArguments, activation_checkpointing=True),
        train_dataset=_whole_rows(job),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    _run(trainer, window, count_tokens)


class TwoModelTrainer(Trainer):
    """DPO as scripts of 2023 ran it: policy and a frozen copy side by side, log-softmax over the whole vocabulary."""

    def __init__(self, *args: Any, reference: PreTrainedModel, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference, self.beta = reference, beta

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        chosen, rejected = self._log_probs(model, inputs).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = self._log_probs(self.reference, inputs).chunk(2)
        return -F.logsigmoid(self.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()

    @staticmethod
    def _log_probs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        targets = inputs["labels"][:, 1:]
        picked = logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        return (picked * (targets != IGNORED)).sum(1)


def train_two_models(job: Job, window: Window) -> None:
    """DPO with a second, frozen model in memory; random batches padded to the longest, checkpointing on."""
    settings = job.experiment.model
    reference = load_model(job.parent, settings, torch.float32).eval().requires_grad_(False)
    trainer = TwoModelTrainer(
        model=_model(job),
        args=_arguments(job, TrainingArguments, activation_checkpointing=True, remove_unused_columns=False),
        train_dataset=open_rows(job.rows).dataset,
        data_collator=pad_pairs,
        reference=reference,
        beta=job.section.beta,
    )
    _run(trainer, window, count_pairs)


def pad_pairs(rows: list[dict]) -> dict[str, torch.Tensor]:
    """[2B, T]: the chosen sequences, then the rejected ones."""
    pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    labels = [torch.tensor([IGNORED] * len(prompt) + answer) for prompt, answer in pairs]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }


# -------------------------------------------------------------------------------------------------------- shared


def _lora(job: Job) -> Any:
    return lora_config(job.section.lora) if job.section.lora else None


def _model(job: Job) -> torch.nn.Module:
    model = load_model(job.parent, job.experiment.model, torch.float32)
    lora = _lora(job)
    set_seed(job.experiment.seed)
    return get_peft_model(model, lora) if lora else model


def _causal_model(model: torch.nn.Module) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _row_length(job: Job) -> int:
    if job.stage == "pretraining":
        return job.section.block_size
    return job.section.max_source_length + job.section.max_target_length


def _arguments(job: Job, kind: type[TrainingArguments], **extra: Any) -> TrainingArguments:
    """What a comparison on one CPU needs to be the same; all else stays as the library has it."""
    return kind(
        output_dir=str(job.checkpoints),
        seed=job.experiment.seed,
        num_train_epochs=1,
        per_device_train_batch_size=job.section.batch_size_per_device,
        learning_rate=job.section.learning_rate,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **extra,
    )


def _whole_rows(job: Job) -> Dataset:
    """`input_ids` and `labels` of one conversation (or one block) each."""
    rows = open_rows(job.rows).dataset
    labels = "input_ids" if job.stage == "pretraining" else "labels"
    return Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows[labels]})


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
