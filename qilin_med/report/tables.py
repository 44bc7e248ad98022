"""What the report says of a run: tables in Markdown, numbers as they are printed, sentences."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from qilin_med.config.paper import SCORES, differences
from qilin_med.evaluate.results import HELD_OUT
from qilin_med.report.collect import HEADLINES, LABELS, Result, Run
from qilin_med.report.figures import Dot
from qilin_med.train.metrics import checkpoint_cost

Table = list[dict[str, Any]]
"""Rows, each with its cells by column; a cell that a row lacks is empty."""

SHORT = 12  # characters of a fingerprint that are shown
# Beginnings count: "49.5 [44.9, 54.2]", "0.92 ± 0.02" and "1,024" are numbers.
_NUMBER = re.compile(r"[-+−<]? ?\d[\d,.]*(e-?\d+)?%?( [\[±(].*)?$")
PAPER_SETS = {"ceval": "C-Eval test", "cmexam": "CMExam test", "huatuo": "Huatuo-26M test"}
"""By how SCORES calls them, the sets of the paper's Tables 4 to 6: no other is set beside its figures."""
_PLACES = {"perplexity": 2, "answer loss": 3, "preference accuracy": 3}
UNITS = {
    "average": "% right, mean of subjects",
    "accuracy": "% right",
    "rougeL_char": "ROUGE-L on characters",
    None: "no answers",
}
_ONE_LETTER = 0.9  # share of questions from which on a model is said to answer one letter
_ASIDES = {
    "without_gold": "{:,} questions without a known answer left out",
    "several_answers": "{:,} questions with several right answers left out",
    "shortened_passages": "{:,} prompts with shortened passages",
    "cut_prompts": "{:,} prompts cut",
    "unparsed": "{:,} answers name no option and count as wrong",
    "empty": "{:,} answers are empty",
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
    places = _decimals(name)
    error = f" ± {measured['standard_error']:.{places}f}" if "standard_error" in measured else ""
    return f"{measured['value']:,.{places}f}{error}"


def _decimals(name: str) -> int:
    return next(places for prefix, places in _PLACES.items() if name.startswith(prefix))


def probability(test: dict[str, Any]) -> str:
    return "p < 0.0001" if test["p"] < 0.0001 else f"p = {test['p']:.2g}"


# ------------------------------------------------------------------------------------------------------ sentences


class Panel(NamedTuple):
    """What one picture shows: a set of questions, or a held-out measure."""

    title: str
    words: str
    unit: str
    places: int
    dots: list[Dot]
    """Of the models in order; those with passages in a second colour, after the others."""
    notes: list[str]


def panels(run: Run) -> Iterator[Panel]:
    """Every set and every held-out measure of every model. Intervals of the latter are 1.96 standard errors, if any."""
    for name in dict.fromkeys(result.set for result in run.results if result.headline):
        dots, results = [], [result for result in run.results if result.set == name and result.headline]
        for result in results:
            metric, entry = result.headline, run.comparisons.get((result.name, result.model, result.has_retrieval))
            scores = [points(metric, result.contents["metrics"][metric][key]) for key in ("value", "low", "high")]
            dots.append(Dot(result.label, *scores, step_of(entry, metric, 1), int(result.has_retrieval)))
        words = f"{results[0].questions:,} questions"
        words += "" if results[0].title.startswith(results[0].origin) else f"; {results[0].origin}"
        yield Panel(results[0].title, words, UNITS[results[0].headline], 1, dots, notes(results))
    for name in dict.fromkeys(name for result in run.held_out.values() for name in result["measures"]):
        dots, places = [], _decimals(name)
        for model, measured in ((m, r["measures"][name]) for m, r in run.held_out.items() if name in r["measures"]):
            value, error = measured["value"], 1.96 * measured.get("standard_error", math.nan)
            step = step_of(run.comparisons.get((HELD_OUT, model, False)), name, places)
            dots.append(Dot(LABELS[model], value, value - error, value + error, step))
        yield Panel(name, "held out", "", places, dots, [])


def step_of(entry: dict[str, Any] | None, metric: str, places: int) -> str:
    """ "+9.2, p = 0.0004", or "" without a test."""
    if entry is None or metric not in entry["metrics"]:
        return ""
    test = entry["metrics"][metric]
    difference = points(metric, test["difference"]) if metric in HEADLINES else test["difference"]
    return f"{difference:+.{places}f}, {probability(test)}"


def verdict(run: Run) -> str:
    """One sentence: the last model beside the first one. They differ clearly if their intervals do not meet, or, where
    there is none (losses: lower is better), if one is 5% more than the other."""
    models = [
        LABELS[m] for m in run.models if m in run.held_out or any(r.model == m and r.headline for r in run.results)
    ]
    sides: dict[str, list[str]] = {"better on": [], "worse on": [], "not clearly different on": []}
    for panel in panels(run):
        of_model = {dot.label: dot for dot in panel.dots}
        if models[0] == models[-1] or not {models[0], models[-1]} <= of_model.keys():
            continue
        old, new = of_model[models[0]], of_model[models[-1]]
        low, high, worst, best = new.low, new.high, old.low, old.high
        if math.isnan(new.low):
            low, high, worst, best = -new.value, -new.value, -old.value * 1.05, -old.value / 1.05
        side = "better on" if low > best else "worse on" if high < worst else "not clearly different on"
        values = " → ".join(f"{dot.value:,.{panel.places}f}" for dot in (old, new))
        sides[side].append(f"{panel.title} ({values} {panel.unit}".strip() + ")")
    said = [f"{words} {', '.join(named)}" for words, named in sides.items() if named]
    return f"Against {models[0]}, {models[-1]} is {'; '.join(said)}." if said else ""


def notes(results: list[Result]) -> list[str]:
    """What must stand beside the scores of a set: what was left out, cut or not understood, and of whom."""
    said: dict[str, list[str]] = {}
    for result in results:
        for aside in asides(result.contents["counts"]):
            said.setdefault(aside, []).append(result.label)
    everyone = [result.label for result in results]
    return [aside if labels == everyone else f"{', '.join(labels)}: {aside}" for aside, labels in said.items()]


def asides(counts: dict[str, Any]) -> list[str]:
    """Of one score; counts that a result of an earlier version lacks are passed over."""
    skipped, favourite = counts.get("skipped") or {}, counts.get("favourite") or {"share": 0}
    total = counts["questions"] + sum(skipped.values())
    said = [f"{number:,} of {total:,} questions skipped: {reason}" for reason, number in skipped.items()]
    said += [words.format(counts[name]) for name, words in _ASIDES.items() if counts.get(name)]
    if favourite["share"] >= _ONE_LETTER:
        said.append(f"answers {favourite['letter']} to {favourite['share']:.0%} of the questions")
    return said


# -------------------------------------------------------------------------------------------------------- tables


def pivot(first: str, cells: Iterable[tuple[str, str, Any]]) -> Table:
    """Of (row, column, cell), in their order; the column `first` names the rows."""
    rows: dict[str, dict[str, Any]] = {}
    for name, column, cell in cells:
        rows.setdefault(name, {first: name})[column] = cell
    return list(rows.values())


def score_table(shown: Iterable[Panel]) -> Table:
    """The numbers of these panels."""
    cells = []
    for panel in shown:
        for dot in panel.dots:
            value, low, high = (f"{number:,.{panel.places}f}" for number in dot[1:4])
            span = "" if math.isnan(dot.low) else f" [{low}, {high}]"
            cells.append((dot.label, f"{panel.title}, {panel.unit}".strip(", "), value + span))
    return pivot("model", cells)


def held_out_table(measured: dict[str, dict[str, Any]]) -> Table:
    """One row per model, one column per held-out measure."""
    measures = [(model, *measure) for model, result in measured.items() for measure in result["measures"].items()]
    return pivot("model", ((LABELS[model], name, held_out(name, value)) for model, name, value in measures))


def paired_table(run: Run, headlines: bool) -> Table:
    """Every paired test, in points: of the metrics that stand for all, or of the others."""
    results, table = {(result.model, result.name): result for result in run.results}, []
    for (task, model, with_itself), entry in run.comparisons.items():
        result, name = results.get((model, task)), LABELS[model]
        title, second, headline = (result.title, result.label, result.headline) if result else ("held out", name, None)
        first = name if with_itself else LABELS[entry["first"]] + second.removeprefix(name)
        for metric, test in entry["metrics"].items():
            if (headline in (metric, None)) == headlines:
                spans = [f"{points(metric, test[key]):.1f}" for key in ("low", "high") if key in test]
                table.append({
                    "set": title, "metric": metric, "step": f"{first} → {second}",
                    "difference": f"{points(metric, test['difference']):+.1f}" + (f" [{', '.join(spans)}]" if spans else ""),
                    "gained / lost": f"{test['gained']} / {test['lost']}" if "gained" in test else "",
                    "test": test["test"], "p": f"{test['p']:.2g}", "questions": entry["questions"],
                })  # fmt: skip
    return table


def metric_table(results: list[Result]) -> Table:
    """All metrics of one set of questions, a column for each model, and what stands beside them."""
    cells = [(name, r.label, score(name, r.contents["metrics"])) for r in results for name in r.contents["metrics"]]
    cells += [("questions", result.label, result.questions) for result in results]
    cells += [
        ("left out, cut or unread", r.label, "; ".join(asides(r.contents["counts"])))
        for r in results
        if asides(r.contents["counts"])
    ]
    return pivot("metric", cells)


def protocol_table(of_models: dict[str, Any]) -> Table:
    """One exam in several ways: of each way the score, and the share of answers that are not those of the first way."""
    cells = []
    for model, found in of_models.items():
        label = LABELS[model]
        for way, scores in found["ways"].items():
            cells.append((way, f"{label}: % right", score("accuracy", scores)))
            cells.append((way, f"{label}: answers changed", f"{100 * scores['flips']:.1f}"))
            cells.append((way, f"{label}: calibration error", f"{scores['ece']:.3f}" if "ece" in scores else ""))
    return pivot("asked for", cells)


def protocol_notes(of_models: dict[str, Any]) -> list[str]:
    """What the ways of asking say together."""
    said = []
    for model, found in of_models.items():
        if found["ways"]:
            liked = max(found["places"].items(), key=lambda place: place[1]["chosen"] - place[1]["right"], default=None)
            said.append(f"{LABELS[model]}: {100 * found['spread']:.1f} points from the lowest to the highest score on the same"
                        f" {found['questions']:,} questions; {found['flips']:.0%} of the answers depend on the way of asking"
                        + (f"; {liked[0]} is chosen in {liked[1]['chosen']:.0%} of the answers and right in"
                           f" {liked[1]['right']:.0%}" if liked else ""))  # fmt: skip
    return said


def protocol_dots(of_models: dict[str, Any]) -> list[Dot]:
    dots = []
    for series, (model, found) in enumerate(of_models.items(), 1):
        for way, scores in found["ways"].items():
            numbers = (100 * scores["accuracy"][key] for key in ("value", "low", "high"))
            dots.append(Dot(f"{LABELS[model]}: {way}", *numbers, series=series))
    return dots


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
    """Tables 4 to 6 of the paper by title with our rows below the published ones, each where a model answered its set; then
    C-Eval's val split by itself, which the paper does not report."""
    for task, (title, published) in SCORES.items():
        if rows := _our_rows(run, PAPER_SETS[task], list(published[0])[1:]):
            yield f"The paper's {title}", [*({**row, "protocol": "published"} for row in published), *rows]
    if rows := _our_rows(run, "C-Eval val", list(SCORES["ceval"][1][0])[1:]):
        yield "C-Eval val, of which the paper reports nothing", rows


def _our_rows(run: Run, origin: str, columns: list[str]) -> Table:
    """Results on that set; none of those that measured nothing that the paper reports."""
    # As our metrics are called: "BLEU-1" is bleu1_published, "basic medicine" basic_medicine.
    names = {
        c: re.sub(r"^(bleu|rouge)-(.)$", r"\1\2_published", c.replace(" ", "_"), flags=re.IGNORECASE) for c in columns
    }
    names = {c: name.replace("BLEU", "bleu").replace("ROUGE", "rouge") for c, name in names.items()}
    rows = []
    for result in [result for result in run.results if result.origin == origin]:
        c, cells = result.contents, {column: score(name, result.contents["metrics"]) for column, name in names.items()}
        protocol = [result.title, f"{result.questions:,} questions", f"{c['shots']} examples",
                    "chat template" if c["chat"] else "plain text", *asides(result.contents["counts"])]  # fmt: skip
        rows += (
            [{"model": f"ours: {result.label}", **cells, "protocol": "; ".join(protocol)}]
            if any(cells.values())
            else []
        )
    return rows


def paper_dots(table: Table) -> Iterator[tuple[str, list[Dot]]]:
    """(column, its dots) of each column of a `paper_tables` that we measured: published scores, then ours."""
    for column in list(table[0])[1:-1]:
        dots = []
        for row in [row for row in table if row[column]]:
            numbers = map(float, re.findall(r"-?[\d.]+", row[column]))
            dots.append(
                Dot(row["model"].removeprefix("ours: "), *numbers, series=None if row["protocol"] == "published" else 1)
            )
        if any(dot.series for dot in dots):
            yield column, dots


def time_table(run: Run) -> Table:
    """Where the time of each stage went, as its log has it."""
    table = []
    for stage, rows in run.metrics.items():
        seconds, waited = sum(row.get("seconds", 0) for row in rows), checkpoint_cost(rows)
        table.append({
            "stage": LABELS[stage], "minutes": f"{seconds / 60:,.1f}", "waiting for checkpoints": f"{waited['share']:.1%}",
            "checkpoints": waited["number"], "tokens per second": round(sum(row["tokens"] for row in rows) / (seconds or 1)),
        })  # fmt: skip
    return table


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
