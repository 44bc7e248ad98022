"""Every answer of a run: a few drawn for the report, all of them packed for the browser in its page."""

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qilin_med.artifact import digest
from qilin_med.evaluate.results import read_samples, result_folder
from qilin_med.report.collect import Run

Answers = dict[str, dict[str, dict[str, Any]]]
"""By label of the model, samples as `read_samples` by id of the question."""

SHOWN = 3  # questions of a set
IN_ONE_FILE = 20_000  # answers that the page holds, or a file beside it where there are more


def read_answers(run: Run) -> Iterator[tuple[str, Answers]]:
    """(title of a set, its answers), one set at a time; sets without samples are passed over."""
    for name in dict.fromkeys(result.set for result in run.results):
        results = [result for result in run.results if result.set == name]
        answers = {
            r.label: {s["id"]: s for s in read_samples(result_folder(run.experiment, r.model, r.name))} for r in results
        }
        if answers := {label: samples for label, samples in answers.items() if samples}:
            yield results[0].title, answers


def draw_samples(run: Run) -> Iterator[tuple[str, list[list[tuple[str, dict[str, Any]]]]]]:
    """(set, a few of its questions as every model answered them): as the paper's Figures 3 and 4."""
    for title, answers in read_answers(run):
        if drawn := draw_questions(list(answers.values())):
            yield title, [[(label, samples[question]) for label, samples in answers.items()] for question in drawn]


def draw_questions(answered: list[dict[str, Any]]) -> list[str]:
    """Ids that are in all of them, the smallest sha256 first: a draw that no answer can influence."""
    shared = set.intersection(*map(set, answered)) if answered else set()
    return sorted(shared, key=digest)[:SHOWN]


def answer_of(sample: dict[str, Any]) -> str:
    """What a model wrote, or the letters and the text of the option that it found most likely."""
    output = sample["output"]
    if isinstance(output, str):
        return output.strip() or "(nothing)"
    option = max(output, key=lambda choice: choice[1])[0]
    return sample["answer"] if option == sample["answer"] else f"{sample['answer']} {option}"


def mark_of(sample: dict[str, Any]) -> str:
    if not sample["gold"]:
        return ""
    if "accuracy" in sample["score"]:
        return "✓ right" if sample["score"]["accuracy"] else "✗ wrong"
    return f"ROUGE-L {sample['score']['rougeL_char']:.1f}"


def pack_answers(run: Run, folder: Path) -> list[dict[str, str]]:
    """Parts of the browser's data, each with its `name`, and its `data` or the `file` beside the page that holds them.

    They are in the page while it has at most IN_ONE_FILE answers, else in `folder`, as scripts: a page that is opened from
    a disk may load those, and nothing else.
    """
    parts = [part for title, answers in read_answers(run) for part in _parts(title, answers)]
    if sum(part.pop("answers") for part in parts) <= IN_ONE_FILE:
        return parts
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        (folder / f"{number}.js").write_text(f"samples[{number}] = '{part['data']}'\n", encoding="utf-8")
        part |= {"data": "", "file": f"{folder.parent.name}/{folder.name}/{number}.js"}
    return parts


def _parts(title: str, answers: Answers) -> Iterator[dict[str, Any]]:
    questions = list(dict.fromkeys(question for samples in answers.values() for question in samples))
    at_once = max(1, IN_ONE_FILE // len(answers))
    for start in range(0, len(questions), at_once):
        part = questions[start : start + at_once]
        span = f", questions {start + 1:,} to {start + len(part):,}" if len(questions) > at_once else ""
        asked = [_question([samples.get(question) for samples in answers.values()]) for question in part]
        packed = json.dumps({"models": list(answers), "questions": asked}, ensure_ascii=False).encode()
        data = base64.b64encode(gzip.compress(packed, mtime=0)).decode()
        yield {"name": title + span, "answers": len(part) * len(answers), "data": data, "file": ""}


def _question(samples: list[dict[str, Any] | None]) -> dict[str, Any]:
    """A question with the answer of each model, None where it was not asked; prompts that are alike are kept once."""
    first = next(sample for sample in samples if sample)
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples if sample))
    answers = [
        sample and {
            "text": answer_of(sample), "mark": mark_of(sample), "unread": sample["score"].get("unparsed", 0),
            "right": sample["score"].get("accuracy") if sample["gold"] else None,
            "options": sample["output"] if isinstance(sample["output"], list) else [],
            "sources": sample["sources"], "prompt": prompts.index(sample["prompt"]),
        }
        for sample in samples
    ]  # fmt: skip
    asked = {
        "question": first.get("question") or first["prompt"],
        "gold": first["gold"],
        "facets": first.get("facets", {}),
    }
    return {"id": first["id"], **asked, "prompts": prompts, "answers": answers}
