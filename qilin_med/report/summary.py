"""What each stage changed, by how much and how sure, in sentences."""

from typing import Any

from qilin_med.evaluate.results import HELD_OUT
from qilin_med.report.collect import LABELS, Result, Run
from qilin_med.report.document import Block, Heading, Items, Text
from qilin_med.report.figures import held_out, is_better, may_be_chance, points, probability, score

_STATEMENTS = {
    "accuracy": "{model} answers {share}% of {questions:,} questions of {set} right {interval}",
    "average": "{model} reaches {share}% on average over the subjects of {set} ({questions:,} questions) {interval}",
    "rougeL_char": "{model} answers {questions:,} questions of {set} with ROUGE-L {share} on characters {interval}",
}


def summarise(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if outdated := run.outdated():
        blocks.append(Text(f"Measured before the model was made again: {', '.join(outdated)}. Run evaluate.py again."))
    for model in list(run.models)[1:]:
        plain = [result for result in run.results if result.model == model and not result.variant]
        sentences = [describe_result(run, result) for result in plain if result.headline]
        if sentences := [*sentences, *describe_held_out(run, model)]:
            blocks += [
                Heading(f"{LABELS[model]} ({model})" if model == "pretraining" else LABELS[model]),
                Items(sentences),
            ]
    retrieved = [result for result in run.results if result.variant and result.headline]
    if retrieved:
        blocks += [Heading("Retrieval"), Items([describe_result(run, result) for result in retrieved])]
    note = (
        "In brackets: 95% intervals by bootstrap over questions. Tests are paired on the same questions, two-sided, each"
        " by itself; from p = 0.05 on a difference is called chance."
    )
    return [*blocks, Text(note)] if blocks else [Text("Nothing was evaluated yet: scripts/evaluate.py.")]


def describe_result(run: Run, result: Result) -> str:
    """One sentence: the score with its interval, and the change against the model before, or against no retrieval."""
    metric = result.headline
    value, interval = score(metric, result.metrics[metric]).split(" ", 1)
    said = _STATEMENTS[metric].format(
        model=result.label, share=value, questions=result.questions, set=result.set, interval=interval
    )
    if unread := result.contents["counts"].get("unparsed", 0):
        said += f" ({unread:,} answers name no option and count as wrong)"
    entry = run.test(result.name, result.model, retrieval=bool(result.variant))
    test = entry["metrics"].get(metric) if entry else None
    if test is None:
        return said + "."
    return f"{said}, {_change(metric, test, 'without retrieval' if result.variant else LABELS[entry['first']])}."


def _change(metric: str, test: dict[str, Any], other: str) -> str:
    difference = points(metric, test["difference"])
    size = f"{abs(difference):.1f} points {'more' if difference > 0 else 'fewer'} than {other}"
    if f"{abs(difference):.1f}" == "0.0":
        return f"as much as {other} ({probability(test)})"
    return f"{size}{', which may be chance' if may_be_chance(test) else ''} ({probability(test)})"


def describe_held_out(run: Run, model: str) -> list[str]:
    """What is better and what is worse on held-out data than in the model before: gain and cost of the stage."""
    names = list(run.held_out)
    if model not in names or names.index(model) == 0:
        return []
    previous = names[names.index(model) - 1]
    before, after = (run.held_out[name]["measures"] for name in (previous, model))
    changes: dict[bool, list[str]] = {True: [], False: []}
    for name in [name for name in after if name in before and after[name]["value"] != before[name]["value"]]:
        sure = _how_sure(run, model, name)
        told = f"{name} {held_out(name, after[name])} (was {held_out(name, before[name])}{sure})"
        changes[is_better(name, before[name]["value"], after[name]["value"])].append(told)
    words = {True: "On held-out data better", False: "The price, on held-out data worse"}
    return [f"{words[side]} than {LABELS[previous]}: {'; '.join(told)}." for side, told in changes.items() if told]


def _how_sure(run: Run, model: str, measure: str) -> str:
    entry = run.test(HELD_OUT, model)
    test = entry["metrics"].get(measure) if entry else None
    if test is None:
        return ""
    return f"; {'may be chance, ' if may_be_chance(test) else ''}{probability(test)}"
