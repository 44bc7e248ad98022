"""README.md of every merged checkpoint: a model card in the Hub's format.

The card is written after the folder was sealed, and is not part of the seal: it may change with new results while the
model, its fingerprint and its verification stay as they are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qilin_med.config.experiment import STAGES, StageName
from qilin_med.config.paper import BASE_MODEL, HUB_BASE_MODEL
from qilin_med.report.collect import LABELS, Result, Run
from qilin_med.report.document import Table, markdown_table
from qilin_med.report.figures import points
from qilin_med.report.tables import difference_table, held_out_table, metric_table

MARK = "<!-- Written by scripts/report.py. Without this line it will not be written again. -->"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_TASK_TYPES = {"average": "multiple-choice", "accuracy": "multiple-choice", "rougeL_char": "text-generation"}


def write_cards(run: Run) -> Iterator[str]:
    """Write the card of every finished stage; yields a line about each. A card that a person wrote is left alone."""
    for stage in run.manifests:
        path = run.models[stage] / "README.md"
        if path.exists() and MARK not in path.read_text(encoding="utf-8"):
            yield f"{path}: kept, since it is not this script's"
            continue
        path.write_text(str(model_card(run, stage)) + "\n", encoding="utf-8")
        yield f"model card: {path}"


def model_card(run: Run, stage: StageName) -> ModelCard:
    manifest = run.manifests[stage]
    outdated = run.outdated()
    results = [r for r in run.results if r.model == stage and f"{stage} {r.name}" not in outdated]
    measured = {m: r for m, r in run.held_out.items() if m == stage and f"{m} heldout" not in outdated}
    tables = [metric_table([result]) for result in results]
    return ModelCard.from_template(
        _front_matter(run, stage, results),
        template_path=str(_TEMPLATE),
        mark=MARK,
        name=f"{run.experiment.name} {LABELS[stage]}",
        label=LABELS[stage],
        manifest=manifest,
        stages=[{"label": LABELS[s], **run.manifests[s]} for s in _way_to(run, stage)],
        base=str(run.models["base"]),
        differences=markdown_table(_differences(run, stage)),
        held_out=markdown_table(held_out_table(measured)) if measured else "",
        results=[(result, markdown_table(table)) for result, table in zip(results, tables, strict=True)],
    )


def _front_matter(run: Run, stage: StageName, results: list[Result]) -> ModelCardData:
    is_baichuan = run.models["base"].name.lower() == BASE_MODEL
    scored = [_hub_result(result) for result in results if result.headline]
    return ModelCardData(
        language="zh",
        license="other",
        license_name="that-of-the-base-model-and-the-data",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["medical", "qilin-med", LABELS[stage].lower()],
        base_model=HUB_BASE_MODEL if is_baichuan else None,
        datasets=_datasets(run, stage) or None,
        model_name=f"{run.experiment.name}-{stage}" if scored else None,
        eval_results=scored or None,
    )


def _hub_result(result: Result) -> EvalResult:
    metric = result.headline
    return EvalResult(
        task_type=_TASK_TYPES[metric],
        dataset_type=result.name,
        dataset_name=result.name,
        metric_type=metric,
        metric_value=round(points(metric, result.metrics[metric]["value"]), 2),
    )


def _differences(run: Run, stage: StageName) -> Table:
    """From the paper, in the stages that made this model."""
    table, made_by = difference_table(run.settings(), run.ranks()), {"seed", "model", "launch", *_way_to(run, stage)}
    return replace(table, rows=[row for row in table.rows if row[0].split(".")[0] in made_by])


def _datasets(run: Run, stage: StageName) -> list[str]:
    """Names of the corpus build's sources that this stage or one before it was trained on."""
    sources = run.corpus["sources"] if run.corpus else []
    return list(dict.fromkeys(source["name"] for source in sources if source["stage"] in _way_to(run, stage)))


def _way_to(run: Run, stage: StageName) -> list[StageName]:
    return [s for s in STAGES[: STAGES.index(stage) + 1] if s in run.manifests]
