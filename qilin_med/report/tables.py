"""Tables of a run: scores, scores beside the paper's, tests, data, settings."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import STAGES
from qilin_med.config.paper import BASE_MODEL, CEVAL, CMEXAM, CORPUS, HUATUO, PublishedTable, differences
from qilin_med.report.collect import LABELS, Result, Run
from qilin_med.report.document import Table
from qilin_med.report.figures import held_out, points, score

SHORT = 12  # characters of a fingerprint that are shown
_TEXT_METRICS = ("bleu1", "bleu4", "rouge1", "rouge2", "rougeL")
_MEDICAL = ("clinical_medicine", "physician", "basic_medicine")


# ------------------------------------------------------------------------------------------------------- scores


def answer_table(run: Run) -> Table:
    """The headline score of every model, with and without retrieval, on every set of questions."""
    sets = run.sets()
    by_row: dict[str, dict[str, str]] = {LABELS[model]: {} for model in run.models}
    for result in run.results:
        cell = score(result.headline, result.metrics[result.headline]) if result.headline else ""
        by_row.setdefault(result.label, {})[result.set] = cell
    header = ["model", *(f"{name}, {_unit(run, name)}" for name in sets)]
    return Table(
        "Questions answered",
        header,
        [[label, *(cells.get(name, "") for name in sets)] for label, cells in by_row.items()],
        note="Value and 95% interval.",
    )


def _unit(run: Run, name: str) -> str:
    headline = next((r.headline for r in run.results if r.set == name and r.headline), None)
    return {"average": "subject average %", "accuracy": "% right", "rougeL_char": "ROUGE-L"}.get(headline, "no answers")


def held_out_table(measured: dict[str, dict[str, Any]]) -> Table:
    """One row per model, one column per held-out measure."""
    names = list(dict.fromkeys(name for result in measured.values() for name in result["measures"]))
    return Table(
        "Held-out measures",
        ["model", *names],
        [
            [model, *(held_out(name, result["measures"].get(name)) for name in names)]
            for model, result in measured.items()
        ],
        note="Perplexity: exp of the mean loss over all tokens of held-out text. Answer loss: mean loss, in nats a token,"
        " on held-out answers given their questions. Preference accuracy: share of held-out pairs whose chosen answer is"
        " the likelier one, with its standard error.",
    )


def comparison_table(run: Run) -> Table:
    header = [
        "set",
        "first",
        "second",
        "questions",
        "metric",
        "difference",
        "95% interval",
        "gained / lost",
        "test",
        "p",
    ]
    rows = [
        [entry["task"], entry["first"], entry["second"], f"{entry['questions']:,}", metric, *_test_cells(metric, test)]
        for entry in run.comparisons
        for metric, test in entry["metrics"].items()
    ]
    return Table("Paired tests, second minus first, in points", header, rows)


def _test_cells(metric: str, test: dict[str, Any]) -> list[str]:
    interval = f"[{points(metric, test['low']):.1f}, {points(metric, test['high']):.1f}]" if "low" in test else ""
    counts = f"{test['gained']} / {test['lost']}" if "gained" in test else ""
    return [f"{points(metric, test['difference']):+.1f}", interval, counts, test["test"], f"{test['p']:.2g}"]


def metric_table(results: list[Result]) -> Table:
    """All metrics of one set of questions."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    rows = [
        [result.label, f"{result.questions:,}", *(score(name, result.metrics.get(name)) for name in names)]
        for result in results
    ]
    return Table("All metrics, to 100", ["model", "questions", *names], rows)


def facet_tables(results: list[Result]) -> Iterator[Table]:
    """Accuracy by each facet of one set's questions (department, discipline, difficulty, ...)."""
    for facet in dict.fromkeys(name for result in results for name in result.contents["by_facet"]):
        groups = {r.label: r.contents["by_facet"].get(facet, {}) for r in results}
        values = dict.fromkeys(value for group in groups.values() for value in group)
        asked = {value: entry["questions"] for group in groups.values() for value, entry in group.items()}
        rows = [
            [value, f"{asked[value]:,}", *(score("accuracy", group.get(value)) for group in groups.values())]
            for value in values
        ]
        yield Table(f"Accuracy by {facet}", [facet, "questions", *groups], rows)


# -------------------------------------------------------------------------------------------- beside the paper's


def paper_tables(run: Run) -> list[Table]:
    """Tables 4 to 6 of the paper, with our rows below the published ones."""
    return [_beside(run, table, task) for table, task in ((CEVAL, "ceval"), (CMEXAM, "cmexam"), (HUATUO, "huatuo"))]


def _beside(run: Run, table: PublishedTable, task: str) -> Table:
    published = [[model, *figures, "published"] for model, figures in table.figures().items()]
    ours = [row for model in run.models for row in _our_rows(run, table, task, model)]
    return Table(
        f"The paper's Table {table.number}: {table.title}",
        ["model", *table.columns, "protocol"],
        [*published, *ours],
        ours=len(ours),
    )


def _our_rows(run: Run, table: PublishedTable, task: str, model: str) -> Iterator[list[str]]:
    results = [result for result in run.results if result.model == model and result.task.startswith(task)]
    for result in results:
        is_text = "rougeL_char" in result.metrics
        for unit in ("char", "word") if is_text else ("",):
            cells = _text_cells(result, unit, len(table.columns)) if is_text else _share_cells(result, table)
            yield [f"ours: {result.label}", *cells, _protocol(result, unit)]
    if not results:
        yield [f"ours: {LABELS[model]}", *[""] * len(table.columns), "not run"]


def _text_cells(result: Result, unit: str, columns: int) -> list[str]:
    figures = [f"{result.metrics[f'{metric}_{unit}']['value']:.2f}" for metric in _TEXT_METRICS]
    return ["", *figures][-columns:]


def _share_cells(result: Result, table: PublishedTable) -> list[str]:
    metrics = ("average", *_MEDICAL) if table is CEVAL else ("accuracy",)
    cells = [score(metric, result.metrics.get(metric)) for metric in metrics]
    return cells + [""] * (len(table.columns) - len(cells))


def _protocol(result: Result, unit: str) -> str:
    contents = result.contents
    named = result.name if result.set == result.task else f"{result.name} ({result.task})"
    parts = [
        named,
        f"{result.questions:,} questions",
        f"{contents['shots']} examples",
        "chat template" if contents["chat"] else "plain text",
        {"char": "characters", "word": "jieba words"}.get(unit, ""),
        f"model {contents['model']['fingerprint'][:SHORT]}",
    ]
    return "; ".join(filter(None, parts))


def comparability(run: Run) -> str:
    """What the reader of our rows beside published ones must know."""
    name = run.experiment.model.path
    base = "" if Path(name).name.lower() == BASE_MODEL else f" The base model of this run is {name}, not Baichuan-7B."
    return (
        f"Published figures (arXiv:2310.09089) as printed.{base} Our rows tell their protocol: they compare with one"
        " another, and with published ones only where model, questions and protocol are the same. Empty: not measured."
    )


# --------------------------------------------------------------------------------------------------------- data


def data_table(run: Run) -> Table:
    """What each finished stage read, used and skipped."""
    header = ["stage", "records", "used", "skipped", "rows", "tokens", "trained on", "cut questions", "cut answers",
              "updates", "ranks"]  # fmt: skip
    return Table("What each stage read", header, [_data_row(stage, m) for stage, m in run.manifests.items()])


def _data_row(stage: str, manifest: dict[str, Any]) -> list[str]:
    counts = manifest["data"]["counts"]
    read = [counts["records"], counts["used"], sum(counts["skipped"].values())]
    made = [counts[name] for name in ("rows", "tokens", "trained_tokens")]
    cut = [counts.get(name, 0) for name in ("cut_sources", "cut_targets")]
    return [LABELS[stage], *(f"{n:,}" for n in (*read, *made, *cut, manifest["updates"], manifest["ranks"]))]


def skipped_table(run: Run) -> Table:
    rows = [
        [LABELS[stage], reason, f"{number:,}"]
        for stage, manifest in run.manifests.items()
        for reason, number in manifest["data"]["counts"]["skipped"].items()
    ]
    return Table("Records skipped", ["stage", "reason", "records"], rows)


def file_table(run: Run) -> Table:
    rows = [
        [LABELS[stage], file["path"], *(f"{file[n]:,}" for n in ("records", "used", "skipped")), file["sha256"][:SHORT]]
        for stage, manifest in run.manifests.items()
        for file in manifest["data"]["counts"]["files"]
    ]  # fmt: skip
    return Table("Files", ["stage", "file", "records", "used", "skipped", "sha256"], rows)


def corpus_tables(run: Run) -> Iterator[Table]:
    """ChiMed as built, beside the paper's Tables 1 to 3."""
    sources = run.corpus["sources"] if run.corpus else []
    for number, stage in enumerate(STAGES, 1):
        if rows := [_corpus_row(source) for source in sources if source["stage"] == stage]:
            header = ["dataset", "rows", "skipped", "rejected", "duplicates", "samples", "tokens", "MB",
                      "paper: samples", "paper: tokens", "paper: MB"]  # fmt: skip
            yield Table(f"{run.corpus['name']}, {LABELS[stage]} (the paper's Table {number})", header, rows)


def _corpus_row(source: dict[str, Any]) -> list[str]:
    _, paper = CORPUS[source["stage"]].get(source["name"], ("", ("", "", "")))
    rejected = source.get("rejected", source.get("dropped"))  # the name in corpora of format 1
    reasons = (source["rows_skipped"], rejected, source["duplicates"])
    figures = [source["rows"], *(sum(counts.values()) for counts in reasons)]
    figures += [source["train"] + source["dev"], source["tokens"]]
    return [source["name"], *(f"{figure:,}" for figure in figures), f"{source['bytes'] / 1e6:,.1f}", *paper]


# ----------------------------------------------------------------------------------------------------- settings


def difference_table(settings: dict[str, Any], ranks: Mapping[str, int]) -> Table:
    """Settings that differ from the paper's; arguments as of `differences`."""
    rows = [
        [key, _shown(paper), _shown(ours), "the paper" if stated else "our choice, the paper is silent"]
        for key, paper, ours, stated in differences(settings, ranks)
    ]
    return Table(
        "Settings that differ from the paper's",
        ["setting", "paper", "this experiment", "the paper's value is stated by"],
        rows,
        note="Where the paper is silent, its column holds the value of configs/qilin_med_7b.json.",
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def model_table(run: Run) -> Table:
    rows = [["base", str(run.models["base"]), _base_fingerprint(run), "", "", ""]]
    rows += [
        [LABELS[stage], str(run.models[stage]), manifest["fingerprint"], manifest["parent"]["fingerprint"][:SHORT],
         manifest["created"], manifest["commit"] or ""]
        for stage, manifest in run.manifests.items()
    ]  # fmt: skip
    return Table("Models", ["model", "folder", "fingerprint", "parent", "made", "commit of the code"], rows)


def _base_fingerprint(run: Run) -> str:
    """As the first stage found it, else as it was measured."""
    known = [
        m["parent"]["fingerprint"] for m in run.manifests.values() if m["parent"]["folder"] == str(run.models["base"])
    ]
    known += [r.contents["model"]["fingerprint"] for r in run.results if r.model == "base"]
    return known[0] if known else ""


def version_table(run: Run) -> Table:
    """Library versions of every stage and of the newest result."""
    columns = {LABELS[stage]: manifest["versions"] for stage, manifest in run.manifests.items()}
    if run.results:
        columns["evaluation"] = run.results[-1].contents["versions"]
    names = dict.fromkeys(name for versions in columns.values() for name in versions)
    rows = [[name, *(versions.get(name, "") for versions in columns.values())] for name in names]
    return Table("Versions", ["library", *columns], rows)
