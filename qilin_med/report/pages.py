"""report.md, report.html and the model cards, each a template filled with a run."""

import json
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from qilin_med.artifact import differences as changes_between
from qilin_med.config.experiment import STAGES, DataSource, StageName
from qilin_med.config.paper import BASE_MODEL, CORPUS, HUB_BASE_MODEL
from qilin_med.data.read.readers import find_files, read_training_file
from qilin_med.data.rows import KINDS
from qilin_med.errors import UserError
from qilin_med.evaluate.results import HELD_OUT
from qilin_med.report import figures, samples, tables
from qilin_med.report.collect import LABELS, Run

MARK = "<!-- Written by scripts/report.py. Without this line it will not be written again. -->"
_TASK_TYPES = {"average": "multiple-choice", "accuracy": "multiple-choice", "rougeL_char": "text-generation"}
_METHODS = {
    "pretraining": "continued pre-training", "sft": "supervised fine-tuning", "dpo": "direct preference optimisation",
}  # fmt: skip
_SCRIPTS = {"pretraining": "run_pt.sh", "sft": "run_sft.sh", "dpo": "run_dpo.sh"}
# Rows of tables are passed over: on paper their cells have to break.
_UNBROKEN = re.compile(
    r"^\|.*$|\[-?[\d.,]+, -?[\d.,]+\]|\bp (=|<|&lt;) \d\S*|\d ± \d", re.MULTILINE
)  # an interval or a p-value
_LONG = 39  # characters of a cell from which on it breaks into lines


def _fence(text: str) -> Markup:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}\n{text}\n{fence}")


# Every value is escaped for Markdown where a template prints it, unless it is Markup.
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=tables.escape, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
ENVIRONMENT.filters["fenced"] = _fence
ENVIRONMENT.globals.update(
    tables=tables, table=tables.markdown_table, header=tables.header, row=tables.row, labels=LABELS, figures=figures,
    samples=samples,
)  # fmt: skip


def _fill(template: str, **contents: Any) -> str:
    text = ENVIRONMENT.get_template(template).render(contents)
    return tables.align_tables(re.sub(r"\n{3,}", "\n\n", text)).strip() + "\n"


def write_report(run: Run, config: str, overrides: list[str]) -> Path:
    """Write report.html, report.md and the folder report/ (tables, and samples that are too many for the page) into the run
    folder; returns the first. Config and overrides go into commands."""
    settings, in_file, base = run.settings, run.experiment.model_dump(mode="json"), run.models["base"]
    # As the first stage found it, else as it was measured.
    prints = [m["parent"]["fingerprint"] for m in run.manifests.values() if m["parent"]["folder"] == str(base)]
    prints += [result.contents["model"]["fingerprint"] for result in run.results if result.model == "base"]
    contents = {
        "run": run, "now": time.strftime("%Y-%m-%d %H:%M %z"), "stages": STAGES,
        "changed_by": " and ".join(", ".join(LABELS[model] for model in list(run.models)[1:]).rsplit(", ", 1)),
        "is_papers_base": base.name.lower() == BASE_MODEL, "base_fingerprint": prints[0] if prints else "",
        "published": CORPUS, "commands": _commands(run, config, overrides),
        "differences": tables.difference_table(settings, run.ranks),
        "changed_since": changes_between({s: settings[s] for s in run.manifests}, {s: in_file[s] for s in run.manifests}),
        "settings": json.dumps(settings, ensure_ascii=False, indent=2),
    }  # fmt: skip
    return write_pages("report.md.jinja", contents, Path(run.experiment.output_dir), run)


def write_pages(template: str, contents: dict[str, Any], folder: Path, run: Run | None = None) -> Path:
    """Fill report.md without pictures, report.html with them and with the answers of `run`; returns the second."""
    path, beside = folder / "report.html", folder / "report"
    shutil.rmtree(beside, ignore_errors=True)  # of an earlier report
    parts = samples.pack_answers(run, beside / "samples") if run else []
    path.with_suffix(".md").write_text(_fill(template, **contents, with_pictures=False), encoding="utf-8")
    markdown = _fill(template, **contents, with_pictures=True)
    body, sections = _to_html(markdown, beside / "tables")
    page, title = ENVIRONMENT.get_template("page.html.jinja"), re.search(r"^# (.+)", markdown, flags=re.MULTILINE)[1]
    path.write_text(page.render(title=title, sections=sections, body=body, parts=parts), encoding="utf-8")
    return path


def _commands(run: Run, config: str, overrides: list[str]) -> str:
    extra = "".join(f" {shlex.quote(override)}" for override in overrides)
    lines = [f"CONFIG={config} bash {_SCRIPTS[stage]}{extra}" for stage in run.manifests]
    has_retrieval = any(result.set != result.name for result in run.results)
    scripts = ["evaluate", *(["build_index", "evaluate --retrieval"] if has_retrieval else []), "report"]
    for script, *flags in map(str.split, scripts):
        lines.append(" ".join([f".venv/bin/python scripts/{script}.py --config {config}", *flags]) + extra)
    return "\n".join(lines)


def _to_html(markdown: str, files: Path) -> tuple[Markup, dict[str, str]]:
    """The page's body, and its sections by anchor; every table that has a caption also goes into `files`."""
    parser = MarkdownIt("commonmark").enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n')
    parser.add_render_rule(
        "table_close", lambda _, tokens, at, *__: "</table></div>\n" + tokens[at].meta.get("links", "")
    )
    unbroken = _UNBROKEN.sub(lambda m: m[0] if m[0].startswith("|") else m[0].replace(" ", "\u00a0"), markdown)
    tokens, sections, caption = parser.parse(unbroken), {}, ""
    for at, (before, opening, inline) in enumerate(zip(tokens, tokens[1:], tokens[2:], strict=False)):
        words = inline.content
        if (opening.type, opening.tag) == ("heading_open", "h2"):
            sections[anchor := words.lower().replace(" ", "-")] = words
            opening.attrSet("id", anchor)
        elif opening.type == "paragraph_open":
            caption = _plain(inline) if re.fullmatch(r"\*\*.+\*\*", words) else ""
        elif opening.type == "table_open" and caption:
            end = next(n for n in range(at, len(tokens)) if tokens[n].type == "table_close")
            tokens[end].meta["links"] = _write_table(tokens[at:end], caption, files)
            caption = ""
        elif opening.type == "td_open" and words.startswith("ours: "):
            before.attrSet("class", "ours")
        elif opening.type == "td_open" and (words in ("✓ right", "✗ wrong") or len(words) > _LONG):
            opening.attrSet("class", words[2:] if len(words) <= _LONG else "long")
    return Markup(parser.renderer.render(tokens, parser.options, {})), sections


def _plain(inline: Token) -> str:
    """Text as a reader sees it."""
    text = "".join("\n" if child.type == "html_inline" else child.content for child in inline.children)
    return text.replace("\u00a0", " ")


def _write_table(tokens: list[Token], caption: str, folder: Path) -> str:
    """A table as CSV, with scores apart from their intervals, and as LaTeX, as it is printed; returns links to both."""
    cells = [_plain(inline) for cell, inline in pairwise(tokens) if cell.type in ("th_open", "td_open")]
    width = sum(token.type == "th_open" for token in tokens)
    printed = pandas.DataFrame([cells[n : n + width] for n in range(width, len(cells), width)], columns=cells[:width])
    stem = re.sub(r"\W+", "-", caption.lower()).strip("-")[:60]
    folder.mkdir(parents=True, exist_ok=True)
    name = next(n for n in [stem, *(f"{stem}-{n}" for n in range(2, 1000))] if not (folder / f"{n}.csv").exists())
    (folder / f"{name}.tex").write_text(printed.to_latex(index=False, escape=True), encoding="utf-8")
    apart = {}
    for column, values in printed.items():
        numbers = values.str.replace(r"(?<=\d),(?=\d{3})", "", regex=True)
        parts = numbers.str.extract(r"^([-+]?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]$")
        apart[column] = parts[0].fillna(numbers)
        if parts[0].notna().any():
            apart |= {f"{column} low": parts[1], f"{column} high": parts[2]}
    pandas.DataFrame(apart).to_csv(folder / f"{name}.csv", index=False)
    links = {kind: f"{folder.parent.name}/{folder.name}/{quote(name)}.{kind}" for kind in ("csv", "tex")}
    return f'<p class="files"><a href="{links["csv"]}">CSV</a> <a href="{links["tex"]}">LaTeX</a></p>\n'


# --------------------------------------------------------------------------------------------------- model cards


def write_cards(run: Run) -> Iterator[str]:
    """Write README.md, a card in the Hub's format, of every finished stage; yields a line about each.

    A card is written after its folder was committed, and is not among the files of the commit: it may change with new
    results while the model, its fingerprint and its verification stay as they are. One that a person wrote is kept.
    """
    for stage in run.manifests:
        path = run.models[stage] / "README.md"
        if path.exists() and MARK not in path.read_text(encoding="utf-8"):
            yield f"{path}: kept, since it is not this script's"
            continue
        path.write_text(str(_model_card(run, stage)) + "\n", encoding="utf-8")
        yield f"model card: {path}"


def _languages(run: Run, stages: list[StageName]) -> list[str]:
    """Those of the first records of each stage's data: Chinese characters against pairs of Latin words. [] if it is gone."""
    marks = Counter()
    for stage in stages:
        with suppress(UserError):
            file, source = find_files([DataSource(**data) for data in run.settings[stage]["data"]])[0]
            text = "".join(map(repr, islice(read_training_file(KINDS[stage], file, source), 100)))
            marks.update(zh=len(re.findall("[一-鿿]", text)), en=len(re.findall("[a-z]{2} [a-z]{2}", text)))
    return [language for language, count in marks.items() if count > marks.total() / 5]


def _model_card(run: Run, stage: StageName) -> ModelCard:
    stages = list(run.manifests)[: list(run.manifests).index(stage) + 1]
    results = [r for r in run.results if r.model == stage and f"{stage} {r.name}" not in run.outdated]
    is_measured = stage in run.held_out and f"{stage} {HELD_OUT}" not in run.outdated
    sources = [source for source in (run.corpus["sources"] if run.corpus else []) if source["stage"] in stages]
    read = [Path(source["path"]).stem for stage in stages for source in run.settings[stage]["data"]]
    base = Path(run.manifests[stages[0]]["parent"]["folder"])
    # Of a stage without the section every weight is trained.
    how = [f"{_METHODS[s]} {'with LoRA' if run.settings[s]['lora'] else 'of all parameters'}" for s in stages]
    made_by = {"seed", "model", "launch", *stages}
    differences = tables.difference_table(run.settings, run.ranks)
    scored = []
    for result in [result for result in results if result.headline]:
        value = tables.points(result.headline, result.contents["metrics"][result.headline]["value"])
        kind, name = _TASK_TYPES[result.headline], result.name
        scored.append(EvalResult(kind, name, name, metric_type=result.headline, metric_value=round(value, 2)))
    metadata = ModelCardData(
        language=_languages(run, stages) or None, license="other", license_name="that-of-the-base-model-and-the-data",
        library_name="transformers", pipeline_tag="text-generation", tags=["medical", "qilin-med", LABELS[stage].lower()],
        base_model=HUB_BASE_MODEL if base.name.lower() == BASE_MODEL else base.name,
        datasets=list(dict.fromkeys([source["name"] for source in sources] or read)),
        model_name=f"{run.experiment.name}-{stage}" if scored else None, eval_results=scored or None,
    )  # fmt: skip
    card = _fill(
        "card.md.jinja", run=run, stage=stage, stages=stages, manifest=run.manifests[stage], mark=Markup(MARK),
        metadata=Markup(metadata.to_yaml()), datasets=metadata.datasets, base=metadata.base_model, how=how, results=results,
        measured={stage: run.held_out[stage]} if is_measured else {},
        differences=[row for row in differences if row["setting"].split(".")[0] in made_by],
    )  # fmt: skip
    return ModelCard(card)
