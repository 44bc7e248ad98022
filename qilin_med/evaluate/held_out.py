"""Held-out measures of a model: perplexity, answer loss, preference accuracy.

Rows come from the same code as in training (template, limits, reasons to skip a record), so a measure and a loss curve
speak of the same thing.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qilin_med.artifact import Artifact, digest, fingerprint_model
from qilin_med.config.experiment import Experiment, StageConfig, StageName
from qilin_med.console.progress import progress
from qilin_med.data.rows import PreparedRows, prepare_rows
from qilin_med.evaluate.results import HELD_OUT, read_result, result_folder, write_result
from qilin_med.model.batches import Collator, model_inputs
from qilin_med.model.folder import check_model_folder, max_positions
from qilin_med.model.load import load_for_inference, load_tokenizer
from qilin_med.model.losses import forward_through_head, pair_log_probs, target_losses


class HeldOut(NamedTuple):
    """One set of held-out data. `key`: the setting that names its files; `section`: its stage's settings, with these
    files in place of the training data."""

    name: str
    key: str
    stage: StageName
    section: StageConfig


def held_out_sets(experiment: Experiment) -> Iterator[HeldOut]:
    """Every held-out set of the evaluation section whose stage is part of the experiment: the stage sets the limits."""
    settings, texts = experiment.evaluation, experiment.evaluation.documents
    wanted = [(f"perplexity {name}", f"documents.{name}", "pretraining", data) for name, data in texts.items()]
    wanted.append(("answer loss", "answers", "sft", settings.answers))
    wanted.append(("preference accuracy", "preferences", "dpo", settings.preferences))
    for name, key, stage, data in wanted:
        if data and (section := getattr(experiment, stage)):
            yield HeldOut(name, f"evaluation.{key}", stage, section.model_copy(update={"data": data}))


def measure_held_out(experiment: Experiment, name: str, folder: Path) -> dict[str, Any]:
    """Measure one model on every held-out set, and make the result "heldout".

    A result for the same model, rows and settings is not computed again.
    """
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder, experiment.model.template)
    cache, positions = Path(experiment.output_dir) / "cache", max_positions(folder)
    sets = [(x, prepare_rows(x.stage, x.section, tokenizer, positions, cache)) for x in held_out_sets(experiment)]
    inputs = {
        "model": {"folder": str(folder), "fingerprint": fingerprint_model(folder)},
        "template": digest(tokenizer.chat_template),
        "rows": {held_out.name: rows.folder.name for held_out, rows in sets},
    }
    artifact = Artifact(result_folder(experiment, name, HELD_OUT), inputs)
    if artifact.state().name == "done":
        return read_result(artifact.folder)
    model = load_for_inference(folder, experiment.model, experiment.launch.device)
    measures = {}
    for held_out, rows in sets:
        measure = preference_accuracy if held_out.stage == "dpo" else token_loss
        measures[held_out.name] = measure(model, rows, experiment.evaluation.batch_size)
        if held_out.stage == "pretraining":
            measures[held_out.name]["value"] = math.exp(measures[held_out.name]["value"])
    artifact.facts = {"experiment": experiment.model_dump(mode="json"), "overrides": experiment.overrides}
    return write_result(artifact, {"measures": measures})


@torch.no_grad()
def token_loss(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> dict[str, float]:
    """Mean loss in nats per token: of answers, given the question in the chat template; of documents, over all tokens but
    each segment's first."""
    total, count = 0.0, 0
    for batch in _batches(model, rows, batch_size):
        sum_losses = partial(target_losses, labels=batch["labels"], reduction="sum")
        total += forward_through_head(model, model_inputs(batch), sum_losses).item()
        count += batch["items"]
    return {"value": total / count, "tokens": count}


@torch.no_grad()
def preference_accuracy(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> dict[str, Any]:
    """Share of pairs whose chosen answer has the higher log-probability, with the binomial standard error; `margins` are
    log p(chosen) - log p(rejected) of every pair, in the order of the rows."""
    margins = []
    for batch in _batches(model, rows, batch_size):
        chosen, rejected = pair_log_probs(model, batch)
        margins += [round(margin, 4) for margin in (chosen - rejected).tolist()]
    share = sum(margin > 0 for margin in margins) / len(margins)
    error = math.sqrt(share * (1 - share) / len(margins))
    return {"value": share, "pairs": len(margins), "standard_error": error, "margins": margins}


def _batches(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> Iterator[dict[str, Any]]:
    # A row each, so that models are measured whose attention cannot keep packed sequences apart.
    collate = Collator(False, False, model.config.get_text_config().hidden_size)
    with progress("held-out rows", len(rows.dataset), "rows") as advance:
        for start in range(0, len(rows.dataset), batch_size):
            indices = range(start, min(start + batch_size, len(rows.dataset)))
            batch = collate([{**rows.dataset[i], "index": i} for i in indices])
            yield {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            advance(len(indices))
