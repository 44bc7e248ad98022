"""What the report says of a run: tables in Markdown, numbers as they are printed, sentences, sample answers."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from markupsafe import Markup

from qilin_med.artifact import digest
from qilin_med.config.paper import SCORES, differences
from qilin_med.evaluate.results import HELD_OUT, read_samples, result_folder
from qilin_med.report.collect import LABELS, Result, Run

Table = list[dict[str, Any]]
"""Rows, each with its cells by column; a cell that a row lacks is empty."""

SHORT = 12  # characters of a fingerprint that are shown
SAMPLES_SHOWN = 3  # questions of a set
# Beginnings count: "49.5 [44.9, 54.2]", "0.92 ± 0.02" and "1,024" are numbers.
_NUMBER = re.compile(r"[-+−<]? ?\d[\d,.]*(e-?\d+)?%?( [\[±(].*)?$")
_CHANCE = 0.05  # p-values from here on are called chance
_PLACES = {"perplexity": 2, "answer loss": 3, "preference accuracy": 3}
_UNITS = {"average": "subject average %", "accuracy": "% right", "rougeL_char": "ROUGE-L", None: "no answers"}
_STATEMENTS = {
    "accuracy": "{model} answers {share}% of {questions:,} questions of {set} right {interval}",
    "average": "{model} reaches {share}% on average over the subjects of {set} ({questions:,} questions) {interval}",
    "rougeL_char": "{model} answers {questions:,} questions of {set} with ROUGE-L {share} on characters {interval}",
}

# ------------------------------------------------------------------------------------------------------ markdown


def escape(value: Any) -> Markup:
    """Text that Markdown shows as it is, on one line; whole numbers with commas between thousands."""
    if isinstance(value, Markup):
        return value
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*|]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", text)
    return Markup("<br>".join(line.strip() for line in text.splitlines() if line.strip()))


def row(*cells: Any) -> Markup:
    return Markup(f"| {' | '.join(map(escape, cells))} |")


def header(caption: str, *columns: str) -> Markup:
    """Where a table begins; its rows follow, one a line."""
    above = f"\n**{escape(caption)}**\n\n" if caption else ""
    return Markup(f"{above}{row(*columns)}\n{row(*['---'] * len(columns))}")


def markdown_table(table: Table, caption: str = "") -> Markup:
    """Nothing without rows."""
    columns = dict.fromkeys(column for cells in table for column in cells)
    lines = [header(caption, *columns), *(row(*map(cells.get, columns)) for cells in table)]
    return Markup(align_tables("\n".join(lines))) if table else Markup("")


def align_tables(markdown: str) -> str:
    """Pad the cells of every table, and set columns of numbers flush right."""

    def align(table: re.Match) -> str:
        header, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table[0].split("\n")]
        columns = [[cell.strip() for cell in column] for column in zip(header, *rows, strict=True)]
        for column in columns:
            width, cells = max(3, *map(len, column)), [cell for cell in column[1:] if cell]
            is_number = bool(cells) and all(map(_NUMBER.match, cells))
            column[:] = [cell.rjust(width) if is_number else cell.ljust(width) for cell in column]
            column.insert(1, "-" * (width - 1) + (":" if is_number else "-"))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))

    return re.sub(r"^\|.*(\n\|.*)+", align, markdown, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- numbers


def points(metric: str, value: float) -> float:
    """On a scale to 100: BLEU and ROUGE are so already, shares are not."""
    return value if metric.startswith(("bleu", "rouge")) else 100 * value


def score(metric: str | None, measured: Mapping[str, dict[str, float]]) -> str:
    """ "49.5 [44.9, 54.2]", or "" if it was not measured."""
    if metric not in measured:
        return ""
    value, low, high = (points(metric, measured[metric][key]) for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def held_out(name: str, measured: dict[str, Any]) -> str:
    """ "0.917 ± 0.021" (standard error)."""
    places = next(places for prefix, places in _PLACES.items() if name.startswith(prefix))
    error = f" ± {measured['standard_error']:.{places}f}" if "standard_error" in measured else ""
    return f"{measured['value']:,.{places}f}{error}"


def probability(test: dict[str, Any]) -> str:
    """ "McNemar p = 0.0004"."""
    p = test["p"]
    return f"{test['test'].split(',')[0]} " + ("p < 0.0001" if p < 0.0001 else f"p = {p:.2g}")


# ------------------------------------------------------------------------------------------------------ sentences


def summarise(run: Run) -> dict[str, list[str]]:
    """By heading, sentences on what each stage changed, by how much and how sure."""
    summary = {}
    for model in list(run.models)[1:]:
        heading = f"{LABELS[model]} ({model})" if model == "pretraining" else LABELS[model]
        plain = [r for r in run.results if r.model == model and r.headline and r.set == r.name]
        summary[heading] = [*(describe_result(run, result) for result in plain), *describe_held_out(run, model)]
    with_retrieval = [result for result in run.results if result.headline and result.set != result.name]
    summary["Retrieval"] = [describe_result(run, result) for result in with_retrieval]
    return {heading: sentences for heading, sentences in summary.items() if sentences}


def describe_result(run: Run, result: Result) -> str:
    """One sentence: the score with its interval, and the change against the model before, or against no retrieval."""
    metric, unread = result.headline, result.contents["counts"].get("unparsed")
    value, interval = score(metric, result.contents["metrics"]).split(" ", 1)
    text = _STATEMENTS[metric].format(
        model=result.label, share=value, questions=result.questions, set=result.set, interval=interval
    )
    if unread:
        text += f" ({unread:,} answers name no option and count as wrong)"
    has_retrieval = result.set != result.name
    entry = run.comparisons.get((result.name, result.model, has_retrieval))
    if entry is None or metric not in entry["metrics"]:
        return f"{text}."
    test, other = entry["metrics"][metric], "without retrieval" if has_retrieval else LABELS[entry["first"]]
    difference = points(metric, test["difference"])
    change = f"{abs(difference):.1f} points {'more' if difference > 0 else 'fewer'} than {other}"
    if change.startswith("0.0 "):
        change = f"as much as {other}"
    elif test["p"] >= _CHANCE:
        change += ", which may be chance"
    return f"{text}, {change} ({probability(test)})."


def describe_held_out(run: Run, model: str) -> list[str]:
    """What is better and what is worse on held-out data than in the model before: gain and cost of the stage."""
    names = list(run.held_out)
    if model not in names[1:]:
        return []
    previous = names[names.index(model) - 1]
    before, after = (run.held_out[name]["measures"] for name in (previous, model))
    tests = run.comparisons.get((HELD_OUT, model, False), {"metrics": {}})["metrics"]
    better, worse = [], []
    for name in [name for name in after if name in before and after[name]["value"] != before[name]["value"]]:
        change = f"{name} {held_out(name, after[name])} (was {held_out(name, before[name])}"
        if name in tests:
            change += f"; {'may be chance, ' if tests[name]['p'] >= _CHANCE else ''}{probability(tests[name])}"
        # Losses are better when lower, accuracies when higher.
        is_better = (after[name]["value"] > before[name]["value"]) == ("accuracy" in name)
        (better if is_better else worse).append(f"{change})")
    sides = {"On held-out data better": better, "The price, on held-out data worse": worse}
    return [f"{words} than {LABELS[previous]}: {'; '.join(changes)}." for words, changes in sides.items() if changes]


# -------------------------------------------------------------------------------------------------------- tables


def pivot(first: str, cells: Iterable[tuple[str, str, Any]]) -> Table:
    """Of (row, column, cell), in their order; the column `first` names the rows."""
    rows: dict[str, dict[str, Any]] = {}
    for name, column, cell in cells:
        rows.setdefault(name, {first: name})[column] = cell
    return list(rows.values())


def answer_table(run: Run) -> Table:
    """The headline score of every model, with and without retrieval, on every set of questions."""
    headlines = {result.set: result.headline for result in run.results if result.headline}
    columns = {result: f"{result.set}, {_UNITS[headlines.get(result.set)]}" for result in run.results}
    models = [(LABELS[model], "model", LABELS[model]) for model in run.models]
    scores = [(r.label, column, score(r.headline, r.contents["metrics"])) for r, column in columns.items()]
    return pivot("model", models + scores)


def held_out_table(measured: dict[str, dict[str, Any]]) -> Table:
    """One row per model, one column per held-out measure."""
    measures = [(model, *measure) for model, result in measured.items() for measure in result["measures"].items()]
    return pivot("model", ((model, name, held_out(name, value)) for model, name, value in measures))


def metric_table(results: list[Result]) -> Table:
    """All metrics of one set of questions."""
    rows = []
    for result in results:
        metrics = result.contents["metrics"]
        rows.append({"model": result.label, "questions": result.questions, **{m: score(m, metrics) for m in metrics}})
    return rows


def facet_tables(results: list[Result]) -> Iterator[tuple[str, Table]]:
    """Accuracy by each facet of one set's questions (department, discipline, difficulty, ...)."""
    for facet in dict.fromkeys(name for result in results for name in result.contents["by_facet"]):
        cells = []
        for result in results:
            for value, measured in result.contents["by_facet"].get(facet, {}).items():
                cells.append((value, "questions", measured["questions"]))
                cells.append((value, result.label, score("accuracy", {"accuracy": measured})))
        yield facet, pivot(facet, cells)


def paper_tables(run: Run) -> Iterator[tuple[str, Table]]:
    """Tables 4 to 6 of the paper by title, with our rows below the published ones."""
    for task, (title, published) in SCORES.items():
        rows = [{**published_row, "protocol": "published"} for published_row in published]
        columns = list(published[0])[1:]
        for model in run.models:
            results = [r for r in run.results if r.model == model and r.contents["task"].startswith(task)]
            rows += [our_row for result in results for our_row in _our_rows(result, columns)]
            if not results:
                rows.append({"model": f"ours: {LABELS[model]}", "protocol": "not run"})
        yield f"The paper's {title}", rows


def _our_rows(result: Result, columns: list[str]) -> Iterator[dict[str, str]]:
    """One; two of texts, whose scores are on characters and on words."""
    contents, measured = result.contents, result.contents["metrics"]
    is_text = "rougeL_char" in measured
    for unit, words in (("_char", "; characters"), ("_word", "; jieba words")) if is_text else (("", ""),):
        # As our metrics are called: "BLEU-1" is bleu1_char or bleu1_word, "basic medicine" basic_medicine.
        metrics = {c: c.replace("BLEU-", "bleu").replace("ROUGE-", "rouge").replace(" ", "_") + unit for c in columns}
        cells = {c: score(metric, measured) for c, metric in metrics.items()}
        if is_text:
            cells = {c: f"{measured[metric]['value']:.2f}" for c, metric in metrics.items() if metric in measured}
        named = result.name if result.set == contents["task"] else f"{result.name} ({contents['task']})"
        yield {
            "model": f"ours: {result.label}", **cells,
            "protocol": f"{named}; {result.questions:,} questions; {contents['shots']} examples;"
            f" {'chat template' if contents['chat'] else 'plain text'}{words}; model {contents['model']['fingerprint'][:SHORT]}",
        }  # fmt: skip


def skipped_table(run: Run) -> Table:
    counts = [(stage, *c) for stage, m in run.manifests.items() for c in m["data"]["counts"]["skipped"].items()]
    return [{"stage": LABELS[stage], "reason": reason, "records": number} for stage, reason, number in counts]


def difference_table(settings: dict[str, Any], ranks: Mapping[str, int]) -> Table:
    """Settings that differ from the paper's; arguments as of `differences`."""
    table = []
    for key, *values, stated in differences(settings, ranks):
        paper, ours = (v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
        by = "the paper" if stated else "our choice, the paper is silent"
        table.append({"setting": key, "paper": paper, "this experiment": ours, "the paper's value is stated by": by})
    return table


def version_table(run: Run) -> Table:
    """Library versions of every stage and of the newest result."""
    columns = {LABELS[stage]: manifest["versions"] for stage, manifest in run.manifests.items()}
    columns |= {"evaluation": run.results[-1].contents["versions"]} if run.results else {}
    return pivot("library", ((name, of, v) for of, versions in columns.items() for name, v in versions.items()))


# ------------------------------------------------------------------------------------------------ sample answers


def draw_samples(run: Run) -> Iterator[tuple[str, list[list[tuple[str, dict[str, Any]]]]]]:
    """(set, a few of its questions as every model answered them): as the paper's Figures 3 and 4."""
    for name in dict.fromkeys(result.set for result in run.results):
        answered = {}
        for result in [result for result in run.results if result.set == name]:
            samples = {s["id"]: s for s in read_samples(result_folder(run.experiment, result.model, result.name))}
            answered |= {result.label: samples} if samples else {}
        if drawn := draw_questions(list(answered.values())):
            yield name, [[(label, samples[question]) for label, samples in answered.items()] for question in drawn]


def draw_questions(answered: list[dict[str, Any]]) -> list[str]:
    """Ids that are in all of them, the smallest sha256 first: a draw that no answer can influence."""
    shared = set.intersection(*map(set, answered)) if answered else set()
    return sorted(shared, key=digest)[:SAMPLES_SHOWN]


def answer_of(sample: dict[str, Any]) -> str:
    """What a model wrote, or the letters and the text of the option that it found most likely."""
    output = sample["output"]
    if isinstance(output, str):
        return output.strip() or "(nothing)"
    option = max(output, key=lambda choice: choice[1])[0]
    return sample["answer"] if option == sample["answer"] else f"{sample['answer']} {option}"


def verdict(sample: dict[str, Any]) -> str:
    if not sample["gold"]:
        return ""
    if "accuracy" in sample["score"]:
        return "✓ right" if sample["score"]["accuracy"] else "✗ wrong"
    return f"ROUGE-L {sample['score']['rougeL_char']:.1f}"
