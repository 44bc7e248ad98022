"""Held-out measures of a model folder: perplexity, answer loss, preference accuracy.

Rows come from the same code as in training (template, limits, set-aside reasons), so a measure and a loss curve speak of
the same thing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qilin_med.artifact import Artifact, digest, fingerprint_model
from qilin_med.config.experiment import Experiment, Source, StageConfig, StageName
from qilin_med.console.progress import progress
from qilin_med.data.rows import PreparedRows, prepare_rows
from qilin_med.evaluate.results import read_result, write_result
from qilin_med.model.batches import Collator, Layout, PairCollator, TokenCollator, model_inputs
from qilin_med.model.folder import check_model_folder, max_positions
from qilin_med.model.load import load_for_inference, load_tokenizer
from qilin_med.model.losses import forward_through_head, pair_log_probs, target_losses


def evaluate_model(experiment: Experiment, folder: Path, result: Path) -> dict[str, Any]:
    """Measure one model on everything the experiment's evaluation section names, and make the result.

    A result for the same model, rows and settings is not computed again.
    """
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder, experiment.model.template)
    rows = dict(_prepare_all(experiment, folder, tokenizer))
    inputs = {
        "model": {"folder": str(folder), "fingerprint": fingerprint_model(folder)},
        "template": digest(tokenizer.chat_template),
        "rows": {name: prepared.folder.name for name, (_, prepared) in rows.items()},
    }
    artifact = Artifact(result, inputs)
    if artifact.state().name == "done":
        return read_result(result)
    model = load_for_inference(folder, experiment.model, experiment.launch.device)
    measures = {}
    for name, (measure, prepared) in rows.items():
        measures[name] = measure(model, prepared, experiment.evaluation.batch_size)
    artifact.facts = {"experiment": experiment.model_dump(mode="json")}
    return write_result(artifact, {"measures": measures})


def _prepare_all(
    experiment: Experiment, folder: Path, tokenizer: Any
) -> Iterator[tuple[str, tuple[Any, PreparedRows]]]:
    """(name of the measure, (function, rows)) of every held-out set."""
    cache = Path(experiment.output_dir) / "cache"
    for held_out in held_out_sets(experiment):
        rows = prepare_rows(held_out.stage, held_out.section, tokenizer, max_positions(folder), cache)
        yield held_out.name, (held_out.measure, rows)


@dataclass(frozen=True)
class HeldOut:
    """One set of held-out data. `section`: its stage's settings, with the set's files in place of the training data."""

    name: str
    key: str
    """The setting that names its files."""
    stage: StageName
    section: StageConfig
    measure: Callable[[torch.nn.Module, PreparedRows, int], dict[str, Any]]


def held_out_sets(experiment: Experiment) -> Iterator[HeldOut]:
    """Every held-out set of the evaluation section whose stage's section gives the limits."""
    settings = experiment.evaluation
    wanted: list[tuple[str, str, StageName, list[Source], Any]] = [
        *(
            (f"perplexity {name}", f"evaluation.documents.{name}", "pretraining", data, perplexity)
            for name, data in settings.documents.items()
        ),
        ("answer loss", "evaluation.answers", "sft", settings.answers, answer_loss),
        ("preference accuracy", "evaluation.preferences", "dpo", settings.preferences, preference_accuracy),
    ]
    for name, key, stage, data, measure in wanted:
        section = getattr(experiment, stage)
        if data and section:
            yield HeldOut(name, key, stage, section.model_copy(update={"data": data}), measure)


def perplexity(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> dict[str, float]:
    """exp of the mean next-token loss over all tokens but each segment's first."""
    mean, count = _mean_token_loss(model, rows, batch_size)
    return {"value": math.exp(mean), "tokens": count}


def answer_loss(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> dict[str, float]:
    """Mean loss (nats) over the tokens of the answers, given the question in the chat template."""
    mean, count = _mean_token_loss(model, rows, batch_size)
    return {"value": mean, "tokens": count}


@torch.no_grad()
def _mean_token_loss(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for batch in _batches(rows, batch_size, TokenCollator, model):
        sum_losses = partial(target_losses, labels=batch["labels"], reduction="sum")
        total += forward_through_head(model, model_inputs(batch), sum_losses).item()
        count += batch["items"]
    return total / count, count


@torch.no_grad()
def preference_accuracy(model: torch.nn.Module, rows: PreparedRows, batch_size: int) -> dict[str, Any]:
    """Share of pairs whose chosen answer has the higher log-probability, with the binomial standard error; `margins` are
    log p(chosen) - log p(rejected) of every pair, in the order of the rows."""
    margins = []
    for batch in _batches(rows, batch_size, PairCollator, model):
        chosen, rejected = pair_log_probs(model, batch)
        margins += [round(margin, 4) for margin in (chosen - rejected).tolist()]
    share = sum(margin > 0 for margin in margins) / len(margins)
    error = math.sqrt(share * (1 - share) / len(margins))
    return {"value": share, "pairs": len(margins), "standard_error": error, "margins": margins}


def _batches(
    rows: PreparedRows, batch_size: int, collator: Callable[[Layout], Collator], model: torch.nn.Module
) -> Iterator[dict[str, Any]]:
    # A row each, so that models are measured whose attention cannot keep packed sequences apart.
    collate = collator(Layout(False, False, model.config.get_text_config().hidden_size))
    with progress("held-out rows", len(rows.dataset), "rows") as advance:
        for start in range(0, len(rows.dataset), batch_size):
            indices = range(start, min(start + batch_size, len(rows.dataset)))
            batch = collate([{**rows.dataset[i], "index": i} for i in indices])
            yield {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            advance(len(indices))
