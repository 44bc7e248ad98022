"""What a task file of configs/tasks asks: raw files -> rows with their prompts and worked examples.

The settings come from the metadata of the task file, or stand in for it. A chat template strips the line end of a prompt
off again, which in plain text starts the answer on a line of its own.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from datasets import Dataset
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.samplers import ContextSampler

from qilin_med.config.experiment import AnswerForm, QuestionSettings, RawFiles
from qilin_med.data.read.readers import READERS, raw_files, read_file, read_raw
from qilin_med.errors import UserError
from qilin_med.evaluate.tasks.known import recognise
from qilin_med.prompt.wording import exam_answer, exam_prompt, option_lines
from qilin_med.records import Question, Skipped

Row = dict[str, Any]
Options = list[tuple[str, str]]
Form = AnswerForm | Literal["text"]
"""How a question is answered: as in a task's settings, or by a text that is compared with another."""


class Asked(NamedTuple):
    """A question for which passages are wanted."""

    stem: str
    options: Options
    """(letter, text); none of a consultation."""
    said: list[str]
    """All else that the prompt holds, message by message: passages get the room that it leaves."""


Retrieve = Callable[[list[Asked]], list[tuple[str, list[str], bool]]]
"""For each question: text to set before it, ids of the text's sources, and whether passages were cut for want of room."""

MOST_EXAMPLES = 16  # of a group that are kept, whatever is asked for later
ROW_NUMBER = re.compile(r"[:#][0-9]+(?:~[0-9]+)*$")
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def load_questions(answers: Form, shots: int = 0, retrieve: Retrieve | None = None, **metadata: Any) -> dict[str, Any]:
    """Questions and worked examples as one split "all", where `role` tells them apart. Beside it "skipped": unusable rows by
    reason; "several_answers": questions left out because several letters are right and only one can be the most likely;
    "split"; "known_as": the published set that they are, or None.

    UserError: a test file is missing or has no usable question, or a template is wrong.
    """
    own = QuestionSettings.model_fields.keys()  # the harness adds others
    settings = QuestionSettings.model_validate({key: value for key, value in metadata.items() if key in own})
    rows, skipped = read_rows(settings, settings.test)
    split, asked = choose_split(settings, rows)
    known_as = settings.known_as or recognise(asked)
    usable = [row for row in asked if row["explanation"] or not settings.explained]
    skipped |= {"no explanation": missing} if (missing := len(asked) - len(usable)) else {}
    asked = [row for row in usable if len(row["answer"]) <= 1 or answers not in ("letters", "options")]
    if not asked:
        why = (
            'several letters are right in all of them, so set "answers": "generate"' if usable else _why(settings, rows)
        )
        raise UserError(f"{', '.join(settings.test)}: no usable question: {why}")
    examples = list(worked_examples(settings, rows))
    for row in asked:
        row |= {"role": "asked", "round": shots + 1, "group": facet_of(row, settings.shots_by)}
        reorder(row, settings)
    for row in asked + examples:
        row |= write_prompt(row, settings, answers)
    if retrieve:
        add_passages(asked, examples, shots, retrieve)
    found = {"skipped": skipped, "several_answers": len(usable) - len(asked), "split": split, "known_as": known_as}
    return {"all": Dataset.from_list(asked + examples), **found}


def _why(settings: QuestionSettings, rows: list[Row]) -> str:
    """Why no question is asked: the most frequent reason among the first rows, with the fields found and expected."""
    if rows:
        return "its files or subjects are none of those that the task asks (place, subjects)"
    source = raw_source(settings, settings.test)
    found = (pair for file in raw_files(source) for pair in read_file(file, READERS[settings.kind], source))
    reasons = Counter(record.reason for _, record in islice(found, 100) if isinstance(record, Skipped))
    return (
        "; ".join(reason for reason, _ in reasons.most_common(1)).replace("in a corpus file this", "this") or "no row"
    )


# --------------------------------------------------------------------------------------------------------- reading


def read_rows(settings: QuestionSettings, paths: Sequence[str]) -> tuple[list[Row], dict[str, int]]:
    """The usable rows of all files, and how many were skipped for which reason. `number` is a row's place in its file."""
    rows, skipped, size_of = [], Counter(), Counter()
    if not paths:
        return rows, {}
    source = raw_source(settings, paths)
    for size, record in (counted for file in raw_files(source) for counted in read_raw(source, file)):
        place = ROW_NUMBER.split(record.id)[0]  # a file, or member of an archive
        size_of[place] += size
        if isinstance(record, Skipped):
            skipped[record.reason] += size
        elif size:  # a further record of the same row has none
            row = {
                "id": record.id,
                "place": place,
                "number": size_of[place] - 1,
                "context": "",
                "sources": [],
                "cut": False,
            }
            rows.append(row | _question(record))
    return rows, dict(skipped)


def raw_source(settings: QuestionSettings, paths: Sequence[str]) -> RawFiles:
    return RawFiles(name=settings.kind, kind=settings.kind, paths=list(paths), columns=settings.columns)


def _question(record: Any) -> Row:
    """Of a consultation's answers the first counts; it has no options."""
    if not isinstance(record, Question):
        question, answer = record.messages[-2:]
        row = {"stem": question.content, "answer": "", "explanation": answer.content, "letters": [], "options": []}
        return row | {"facets": [], "order": []}
    letters, options = map(list, zip(*record.options, strict=True))
    row = {"stem": record.stem, "answer": record.answer, "explanation": record.explanation, "letters": letters}
    return row | {"options": options, "facets": [list(f) for f in record.facets], "order": list(range(len(options)))}


def choose_split(settings: QuestionSettings, rows: list[Row]) -> tuple[str, list[Row]]:
    """The wanted split, or the first that has answers, and its questions."""
    found = []
    for split in [settings.split] if settings.split else settings.splits:
        found = list(of_place(settings, rows, settings.place, split)) or found
        if any(row["answer"] or row["explanation"] for row in found):
            break
    return split, found


def of_place(settings: QuestionSettings, rows: list[Row], place: str | None, split: str = "") -> Iterator[Row]:
    """The rows of files whose path matches, and of the subjects wanted, with what these tell as facets."""
    pattern = re.compile((place or "").replace("{split}", split))
    for row in rows:
        if match := pattern.search(row["place"]):
            facets = dict(row["facets"]) | match.groupdict()
            subject = facets.get("subject", "")
            if subject in settings.subjects:
                facets["category"] = settings.subjects[subject][-1]
            if subject in settings.subjects or not settings.subjects:
                name = settings.subjects.get(subject, [subject])[0]
                yield {**row, "facets": list(map(list, facets.items())), "subject": subject, "subject_name": name}


def worked_examples(settings: QuestionSettings, rows: list[Row]) -> Iterator[Row]:
    """With the number of each among those of its group. A missing file is passed over: a task may ask for none."""
    if settings.fewshot or not settings.fewshot_place:
        rows, _ = read_rows(settings, [path for path in settings.fewshot if Path(path).exists()])
    rounds: Counter[str] = Counter()
    for row in of_place(settings, rows, settings.fewshot_place):
        group = facet_of(row, settings.shots_by)
        rounds[group] += 1
        if rounds[group] <= MOST_EXAMPLES:
            yield {**row, "role": "example", "round": rounds[group], "group": group}


def facet_of(row: Row, name: str | None) -> str:
    return dict(row["facets"]).get(name, "")


def reorder(row: Row, settings: QuestionSettings) -> None:
    """Put the options of a question in another order; `order` tells their first places."""
    count, order = len(row["options"]), row["order"]
    if settings.shuffle is not None:
        Random(f"{settings.shuffle} {row['id']}").shuffle(order)
    row["order"] = order = [order[(place + settings.rotate) % count] for place in range(count)]
    right = [row["letters"].index(letter) for letter in row["answer"]]
    row["answer"] = "".join(letter for letter, first in zip(row["letters"], order, strict=True) if first in right)
    row["options"] = [row["options"][first] for first in order]


# --------------------------------------------------------------------------------------------------------- wording


def write_prompt(row: Row, settings: QuestionSettings, answers: Form) -> Row:
    """What is asked and what a right answer would be, by the templates of the task."""
    options, right = lettered(row), row["answer"]
    values = {
        **dict(row["facets"]), **row, "several": len(right) > 1, "options_text": option_lines(options),
        "right_texts": "，".join(text for letter, text in options if letter in right),
        "exam_prompt": exam_prompt(row["stem"], options), "exam_answer": exam_answer(right, row["explanation"]),
    }  # fmt: skip
    if options and answers != "options":
        prompt, solution = settings.prompt, fill(settings.solution, values)
    else:
        prompt, solution = settings.stem_prompt, values["right_texts"] if options else row["explanation"]
    return {
        "system": fill(settings.system, values),
        "prompt": fill(prompt, values),
        "solution": solution,
        "prefix": settings.prefix if answers == "letters" else "",
        "rule": settings.rule,
    }


def fill(template: str, values: Row) -> str:
    try:
        return TEMPLATES.from_string(template).render(values)
    except TemplateError as error:
        raise UserError(f"the prompt template '{template}': {error}; it may use {', '.join(values)}") from None


def add_passages(asked: list[Row], examples: list[Row], shots: int, retrieve: Retrieve) -> None:
    """Set what is retrieved before each question."""
    wanted = []
    for row in asked:
        shown = [text for e in show_examples(examples, row, shots) for text in (e["prompt"], e["solution"])]
        longest = max(row["options"], key=len, default="")  # may be a choice
        wanted.append(
            Asked(row["stem"], lettered(row), [row["system"], *shown, row["prompt"], row["prefix"] + longest])
        )
    for row, (text, ids, is_cut) in zip(asked, retrieve(wanted), strict=True):
        row |= {"context": text, "sources": ids, "cut": is_cut, "prompt": text + row["prompt"]}


def lettered(row: Row) -> Options:
    """The options as (letter, text); none of a consultation."""
    return list(zip(row["letters"], row["options"], strict=True))


# -------------------------------------------------------------------------------------------------- for the harness


def asked_rows(rows: Dataset) -> Dataset:
    return rows.select([index for index, role in enumerate(rows["role"]) if role == "asked"])


def example_rows(rows: Dataset) -> Dataset:
    return rows.select([index for index, role in enumerate(rows["role"]) if role == "example"])


def show_examples(examples: Sequence[Row], row: Row, count: int) -> list[Row]:
    """The first worked examples of the question's group."""
    return [example for example in examples if example["group"] == row["group"]][:count]


class Examples(ContextSampler):
    """Always the same worked examples before a question, as in C-Eval's own code; the harness would draw them."""

    def sample(self, n: int, eval_doc: Row | None = None, df: Any = None, **_: Any) -> Sequence[Row]:
        return show_examples(self.df, eval_doc, n)
