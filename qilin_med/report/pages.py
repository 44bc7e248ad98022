"""report.html and report.md of a run: one document, written twice."""

import json
import re
import time
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qilin_med.artifact import differences as changes_between
from qilin_med.report.collect import LABELS, Run
from qilin_med.report.curves import draw_curves
from qilin_med.report.document import Block, Code, Document, Figures, Fold, Heading, Section, Text, to_markdown
from qilin_med.report.samples import sample_blocks
from qilin_med.report.summary import summarise
from qilin_med.report.tables import (
    answer_table,
    comparability,
    comparison_table,
    corpus_tables,
    data_table,
    difference_table,
    facet_tables,
    file_table,
    held_out_table,
    metric_table,
    model_table,
    paper_tables,
    skipped_table,
    version_table,
)

_TOGETHER = re.compile(r"\[-?[\d.,]+, -?[\d.,]+\]|\bp [=<] \d\S*|\d ± \d")
_SCRIPTS = {"pretraining": "run_pt.sh", "sft": "run_sft.sh", "dpo": "run_dpo.sh"}


def write_report(run: Run, config: str, overrides: list[str]) -> Path:
    """Write report.html and report.md into the run folder; returns the first. Config and overrides go into commands."""
    document = compose(run, config, overrides)
    (run.folder / "report.md").write_text(to_markdown(document), encoding="utf-8")
    path = run.folder / "report.html"
    path.write_text(_template().render(document=document), encoding="utf-8")
    return path


@cache
def _template():
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["svg"] = Markup  # drawn by us, its text escaped there
    environment.filters["unbroken"] = keep_together
    return environment.get_template("report.html.jinja")


def keep_together(text: str) -> str:
    """No line ends inside an interval or a p-value."""
    return _TOGETHER.sub(lambda match: match[0].replace(" ", "\u00a0"), text)


def compose(run: Run, config: str, overrides: list[str]) -> Document:
    written = time.strftime("%Y-%m-%d %H:%M %z")
    lead = [
        f"Written {written} from the files of {run.folder}. For research; the models are not for patient care.",
    ]
    sections = [
        Section("Summary", [*_scores(run), *summarise(run)]),
        Section("Results in full", _results(run)),
        Section("Beside the paper", [Text(comparability(run)), *paper_tables(run)]),
        Section("Training curves", _curves(run)),
        Section("Sample answers", sample_blocks(run)),
        Section("Data", _data(run)),
        Section("Settings", _settings(run)),
        Section("To do it again", _commands(run, config, overrides)),
    ]
    return Document(run.experiment.name, lead, [section for section in sections if section.blocks])


def _scores(run: Run) -> list[Block]:
    answers = [answer_table(run)] if run.results else []
    return [*answers, *([held_out_table(run.held_out)] if run.held_out else [])]


def _results(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for name in run.sets():
        results = [result for result in run.results if result.set == name]
        blocks.append(Fold(f"{name}: all metrics, and by facet", [metric_table(results), *facet_tables(results)]))
    if run.comparisons:
        blocks.append(Fold("Paired tests", [comparison_table(run)]))
    return blocks


def _curves(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for stage, rows in run.metrics.items():
        blocks += [Heading(LABELS[stage]), Figures(draw_curves(rows))]
    if blocks:
        blocks.append(
            Text("Lines are means of neighbouring updates, bands reach from the lowest to the highest of them.")
        )
    return blocks


def _data(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if run.manifests:
        blocks.append(data_table(run))
        if (aside := skipped_table(run)).rows:
            blocks.append(aside)
        blocks.append(Fold("Files", [file_table(run)]))
    return [*blocks, *corpus_tables(run)]


def _settings(run: Run) -> list[Block]:
    settings = run.settings()
    table = difference_table(settings, run.ranks())
    blocks: list[Block] = [table] if table.rows else [Text("No setting differs from the paper's.")]
    file = run.experiment.model_dump(mode="json")
    if changed := changes_between({s: settings[s] for s in run.manifests}, {s: file[s] for s in run.manifests}):
        blocks.append(Text(f"The experiment file was changed after training (trained -> now): {'; '.join(changed)}."))
    return [*blocks, Fold("All settings", [Code(json.dumps(settings, ensure_ascii=False, indent=2))])]


def _commands(run: Run, config: str, overrides: list[str]) -> list[Block]:
    extra = "".join(f" '{override}'" for override in overrides)
    has_retrieval = any(result.variant for result in run.results)
    lines = [
        *(f"CONFIG={config} bash {_SCRIPTS[stage]}{extra}" for stage in run.manifests),
        f".venv/bin/python scripts/evaluate.py --config {config}{extra}",
        *([f".venv/bin/python scripts/build_index.py --config {config}{extra}"] if has_retrieval else []),
        *([f".venv/bin/python scripts/evaluate.py --config {config} --retrieval{extra}"] if has_retrieval else []),
        f".venv/bin/python scripts/report.py --config {config}{extra}",
    ]
    return [Code("\n".join(lines)), model_table(run), Fold("Versions", [version_table(run)])]
