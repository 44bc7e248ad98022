"""transformers' Trainer and TRL's DPOTrainer over our own rows, losses and batches."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer

from qilin_med.artifact import disk_errors_explained
from qilin_med.config.experiment import InstructionConfig
from qilin_med.console.progress import progress
from qilin_med.data.rows import open_rows, row_costs
from qilin_med.model.batches import COUNTED, Collator, StepSampler, model_inputs
from qilin_med.model.losses import (
    check_isolation,
    forward_through_head,
    pair_log_probs,
    preference_losses,
    target_losses,
)
from qilin_med.train.callbacks import wait_for_all
from qilin_med.train.checkpoints import is_universal
from qilin_med.train.job import Job
from qilin_med.train.reference_log_probs import ReferenceLogProbs


class RowTrainer(Trainer):
    """What both kinds of training share: steps that are random draws, and numbers counted over all ranks.

    Losses are sums divided by the items (target tokens, or pairs) of the whole step over all ranks, so gradient
    accumulation, ranks and the layout of batches do not change them.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, job: Job, model: Any, **kwargs: Any) -> None:
        self.job = job
        self.packing = isinstance(job.section, InstructionConfig) and job.section.packing
        varlen = job.experiment.model.attention == "flash_attention_2"
        collator = Collator(self.packing, varlen, model.config.get_text_config().hidden_size)
        self.step_metrics: dict[str, torch.Tensor] = {}
        self.seen_rows: list[torch.Tensor] = []
        self.step_counts: dict[str, int] = {}
        self.stop_requested = self.stop_agreed = self.save_agreed = False
        self.save_is_due: Callable[[], bool] = lambda: False  # by rank 0's clock
        rows = open_rows(job.rows).dataset
        rows = rows.add_column("index", np.arange(len(rows)))  # what a batch holds is told by it, and found again
        super().__init__(model=model, train_dataset=rows, data_collator=collator, **kwargs)
        self.add_callback(_Beginning(self))

    def begin(self) -> None:
        """What comes before the first step, once the model is where it trains."""
        if self.job.keeps_sequences_apart:
            check_isolation(self.model, self.data_collator.varlen)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        self.step_sampler = StepSampler(
            row_costs(self.train_dataset), args.per_device_train_batch_size, args.gradient_accumulation_steps,
            args.world_size, args.process_index, args.seed, self.packing,
        )  # fmt: skip
        # The sampler gives each rank its own micro-batches, so accelerate has nothing to divide.
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.step_sampler,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seen_rows = [batch["rows"] for batch in batches]
        self.step_metrics = {}
        counts = [sum(batch[name] for batch in batches) for name in ("items", *COUNTED)]
        # One small exchange a step also lets all ranks agree on stopping and saving after the same one.
        wishes = [int(self.stop_requested), int(self.save_is_due())]
        totals = self.accelerator.reduce(torch.tensor(counts + wishes, device=device), "sum")
        items, *counted, self.stop_agreed, self.save_agreed = totals.tolist()
        self.step_counts = dict(zip(COUNTED, counted, strict=True))
        return batches, max(items, 1)

    def share_of_step(self, total: torch.Tensor, items: int) -> torch.Tensor:
        """A sum over this rank's batch as its share of the step's mean; ranks' gradients get averaged later."""
        return total / items * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.step_counts)
            if self.step_metrics:
                totals = self.accelerator.reduce(torch.stack(list(self.step_metrics.values())), "sum").tolist()
                logs.update(zip(self.step_metrics, totals, strict=True))
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        if resume_from_checkpoint and is_universal(Path(resume_from_checkpoint)):
            self.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
        return super().train(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and is_universal(Path(checkpoint)):
            # ZeRO-3's loader gives all parameter groups one counter of steps, which each of them would raise.
            for state in self.deepspeed.optimizer.optimizer.state.values():
                state["step"] = deepcopy(state["step"])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with progress(f"writing {name}"), disk_errors_explained(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)
        wait_for_all()  # what follows may count on every rank's part


class _Beginning(TrainerCallback):
    def __init__(self, trainer: RowTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The library reaches a batch sampler of one's own only after a resume within an epoch.
        self.trainer.step_sampler.set_epoch(int(state.epoch or 0))


class LanguageModelTrainer(RowTrainer):
    """Next-token training (stages 1 and 2): loss at target positions only, in chunks."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> torch.Tensor:
        sum_losses = partial(target_losses, labels=inputs["labels"], reduction="sum")
        total = forward_through_head(model, model_inputs(inputs), sum_losses)
        return self.share_of_step(total, num_items_in_batch)


class PreferenceTrainer(RowTrainer, DPOTrainer):
    """DPO (stage 3): TRL holds the adapter; the reference's log-probabilities are computed once, before the first step."""

    def __init__(self, job: Job, model: Any, **kwargs: Any) -> None:
        super().__init__(job, model, **kwargs)
        if getattr(self.model, "is_loaded_in_4bit", False):
            # TRL rounds an adapter on 4-bit weights to bf16, too coarse for AdamW; with DeepSpeed, one precision is wanted.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # our rows are tokens already, within our limits

    def begin(self) -> None:
        super().begin()
        store = ReferenceLogProbs(self.job, writes=self.args.process_index == 0)
        needed = self.step_sampler.rows_of_first(self.args.max_steps)
        missing = needed[np.isnan(store.read()[needed]).any(axis=1)]
        wait_for_all()  # until all have read, the file stays
        if len(missing):
            self._compute_reference(store, missing)
        self.reference = torch.from_numpy(store.values).to(self.args.device)  # [rows, 2]: chosen, rejected

    @torch.no_grad()
    def _compute_reference(self, store: ReferenceLogProbs, missing: np.ndarray) -> None:
        """The reference's log-probabilities of the rows `missing`: the model with its adapter off. All ranks take part, and
        learn all of them; rank 0 writes."""
        batches = self._reference_batches(missing)
        rank, ranks, size = self.args.process_index, self.args.world_size, self.args.per_device_train_batch_size
        self.model.eval()
        with (
            disk_errors_explained(store.path),
            progress("reference log-probabilities", len(missing), "pairs") as advance,
            self.accelerator.unwrap_model(self.model).disable_adapter(),
            self.accelerator.autocast(),
        ):
            for start in range(0, len(batches), ranks):
                indices = batches[start + rank]
                inputs = self._prepare_inputs(self.data_collator([self.train_dataset[index] for index in indices]))
                own = torch.full((size, 3), -1.0, dtype=torch.float64, device=self.args.device)  # row, chosen, rejected
                own[: len(indices), 0] = inputs["rows"]
                own[: len(indices), 1:] = torch.stack(pair_log_probs(self.model, inputs), dim=1).double()
                found = self.accelerator.gather(own).cpu().numpy()
                found = found[found[:, 0] >= 0]
                store.add(found[:, 0].astype(np.int64), found[:, 1:])
                advance(len(found))
            store.save()

    def _reference_batches(self, missing: np.ndarray) -> list[list[int]]:
        """Batches of like length, the longest first, as many for each rank: under ZeRO-3 all ranks work together."""
        order = missing[np.argsort(-self.step_sampler.costs[missing], kind="stable")].tolist()
        size, ranks = self.args.per_device_train_batch_size, self.args.world_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return batches + [[]] * (-len(batches) % ranks)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> torch.Tensor:
        chosen, rejected = pair_log_probs(model, inputs)
        reference = self.reference[inputs["rows"]]
        losses, chosen_rewards, rejected_rewards = preference_losses(
            chosen, rejected, reference[:, 0], reference[:, 1], self.beta
        )
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margin": chosen_rewards - rejected_rewards,
            "rewards/accuracy": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for name, values in metrics.items():  # this batch's share; the sum over ranks and accumulation is the step's
            share = values.sum() / num_items_in_batch
            self.step_metrics[name] = self.step_metrics.get(name, 0) + share.detach()
        return self.share_of_step(losses.sum(), num_items_in_batch)
