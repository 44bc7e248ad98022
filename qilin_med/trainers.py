"""transformers' Trainer and TRL's DPOTrainer over our own rows, losses and batches."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import DPOTrainer

from qilin_med.batches import FilledRows, UpdateSampler, collate_packed, collate_preferences
from qilin_med.checkpoints import digest, disk_errors_explained
from qilin_med.job import Job
from qilin_med.losses import preference_losses, sequence_log_probs, target_losses
from qilin_med.models import forward_through_head
from qilin_med.universal import is_universal


class RowTrainer(Trainer):
    """What both kinds of training share: updates instead of batches, and numbers counted over all ranks.

    Losses are sums divided by the items (target tokens, or pairs) of the whole update over all ranks, so gradient
    accumulation and ranks do not change them.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, lengths: np.ndarray | None = None, **kwargs: Any) -> None:
        self.row_lengths = lengths
        self.update_metrics: dict[str, torch.Tensor] = {}
        self.seen_rows: list[torch.Tensor] = []
        self.update_tokens = 0
        self.stop_requested = self.stop_agreed = False
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        ranks, accumulation = self.args.world_size, self.args.gradient_accumulation_steps
        per_update = self.args.per_device_train_batch_size * ranks * accumulation
        rows = len(self.train_dataset)
        self.update_sampler = UpdateSampler(rows, per_update, self.args.seed, self.row_lengths)
        loader = DataLoader(
            FilledRows(self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            sampler=self.update_sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seen_rows = [batch["rows"] for batch in batches]
        self.update_metrics = {}
        counts = [sum(b["items"] for b in batches), sum(b["tokens"] for b in batches), int(self.stop_requested)]
        # One small exchange per update also lets all ranks agree on stopping after the same one.
        totals = self.accelerator.reduce(torch.tensor(counts, device=device), "sum")
        items, self.update_tokens, self.stop_agreed = totals.tolist()
        return batches, max(items, 1)

    def add_metric(self, name: str, total: torch.Tensor) -> None:
        """Add this rank's share of a number of the update (a sum over ranks and accumulation steps)."""
        self.update_metrics[name] = self.update_metrics.get(name, 0) + total.detach()

    def share_of_update(self, total: torch.Tensor, items: int) -> torch.Tensor:
        """A sum over this rank's batch as its share of the update's mean; ranks' gradients get averaged later."""
        return total / items * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["tokens"] = self.update_tokens
            if self.update_metrics:
                totals = self.accelerator.reduce(torch.stack(list(self.update_metrics.values())), "sum").tolist()
                logs.update(zip(self.update_metrics, totals, strict=True))
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
        with disk_errors_explained(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)


class LanguageModelTrainer(RowTrainer):
    """Next-token training on packed rows (stages 1 and 2): loss at target positions only, in chunks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=collate_packed, **kwargs)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> torch.Tensor:
        sum_losses = partial(target_losses, labels=inputs["labels"], reduction="sum")
        total = forward_through_head(model, {key: inputs[key] for key in ("input_ids", "position_ids")}, sum_losses)
        return self.share_of_update(total, num_items_in_batch)


def reference_fingerprint(job: Job) -> str:
    """What the reference's log-probabilities depend on beside the rows."""
    quantization = job.section.lora.quantization
    return digest([job.parent_fingerprint, job.experiment.model.dtype, quantization])


class PreferenceTrainer(RowTrainer, DPOTrainer):
    """DPO (stage 3): TRL holds the adapter and the cached reference pass; logits at answer positions only."""

    def __init__(self, *args: Any, reference: str, **kwargs: Any) -> None:
        self.reference = reference
        super().__init__(*args, data_collator=collate_preferences, **kwargs)
        if getattr(self.model, "is_loaded_in_4bit", False):
            # TRL rounds an adapter on 4-bit weights to bf16, too coarse for AdamW; with DeepSpeed, one precision is wanted.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # our rows are tokens already, within our limits

    def _precompute_ref_logps(self, *args: Any) -> Any:
        # TRL names the cache after a hash of the weights, which ZeRO-3 has taken away by then: all models look alike.
        self._precompute_model_hash = self.reference
        return super()._precompute_ref_logps(*args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed the library rounds all floats of a batch to the weights' precision: bf16 spoils log-probabilities.
        exact = {name: values.to(self.args.device) for name, values in inputs.items() if name.startswith("ref_")}
        return {**super()._prepare_inputs(inputs), **exact}

    def _log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        score = partial(sequence_log_probs, labels=inputs["labels"])
        chosen, rejected = forward_through_head(model, {"input_ids": inputs["input_ids"]}, score).chunk(2)
        return chosen, rejected

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        policy = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), policy.disable_adapter(), self.accelerator.autocast():
            return self._log_probs(model, self._prepare_inputs(inputs))

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int = 1
    ) -> torch.Tensor:
        chosen, rejected = self._log_probs(model, inputs)
        losses, chosen_rewards, rejected_rewards = preference_losses(
            chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], self.beta
        )
        real = inputs["real"]
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margin": chosen_rewards - rejected_rewards,
            "rewards/accuracy": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for name, values in metrics.items():
            self.add_metric(name, values[real].sum() / num_items_in_batch)
        return self.share_of_update(losses[real].sum(), num_items_in_batch)
