"""The same questions, answered by every model: as the paper's Figures 3 and 4."""

from typing import Any

from qilin_med.artifact import digest
from qilin_med.report.collect import Result, Run
from qilin_med.report.document import Block, Fold, Heading, Table, Text

SHOWN = 3  # questions of a set

HOW = (
    f"The {SHOWN} questions of each set that every model was asked and whose ids have the smallest sha256: a draw that no"
    " answer can influence."
)


def sample_blocks(run: Run) -> list[Block]:
    """The first set of questions, and a fold for each other one."""
    sets: list[Fold] = []
    for name in run.sets():
        samples = {result: found for result in run.results if result.set == name and (found := result.samples())}
        if tables := [_side_by_side(samples, question) for question in draw_questions(list(samples.values()))]:
            sets.append(Fold(name, tables))
    if not sets:
        return [Text("No questions were asked yet.")]
    return [Text(HOW), Heading(sets[0].title), *sets[0].blocks, *sets[1:]]


def draw_questions(answered: list[dict[str, Any]]) -> list[str]:
    """Ids that are in all of them, the smallest sha256 first."""
    shared = set.intersection(*map(set, answered)) if answered else set()
    return sorted(shared, key=digest)[:SHOWN]


def _side_by_side(samples: dict[Result, dict[str, Any]], question: str) -> Table:
    chosen = {result: found[question] for result, found in samples.items()}
    first = next(iter(chosen.values()))
    rows = [["reference", first["gold"] or "unknown", ""]]
    for result, sample in chosen.items():
        rows.append([result.label, answer_of(sample), verdict(sample)])
        if sample["sources"]:
            rows.append(["", f"passages: {', '.join(sample['sources'])}", ""])
    return Table(first.get("question", first["prompt"]), ["model", "answer", ""], rows, is_prose=True)


def answer_of(sample: dict[str, Any]) -> str:
    """What a model wrote, or the letters and the text of the option that it found likeliest."""
    output = sample["output"]
    if isinstance(output, str):
        return output.strip() or "(nothing)"
    likeliest = max(output, key=lambda choice: choice[1])[0]
    return sample["answer"] if likeliest == sample["answer"] else f"{sample['answer']} {likeliest}"


def verdict(sample: dict[str, Any]) -> str:
    """ "right", "wrong", or how near a text comes to the reference."""
    scores = sample["score"]
    if not sample["gold"]:
        return ""
    if "accuracy" in scores:
        return "right" if scores["accuracy"] else "wrong"
    return f"ROUGE-L {scores['rougeL_char']:.1f}"
