"""Raw files -> the rows that lm-evaluation-harness asks: exam questions, C-Eval's subjects, consultations."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from qilin_med.config.experiment import Kind, RawFiles
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.errors import UserError
from qilin_med.evaluate.tasks.subjects import SUBJECTS
from qilin_med.evaluate.tasks.wording import lettered
from qilin_med.records import Chat, Question, Skipped

Row = dict[str, Any]
Options = list[tuple[str, str]]
Retrieve = Callable[[list[tuple[str, Options]]], list[tuple[str, list[str]]]]
"""Questions as (stem, options as (letter, text)) -> for each (text to set before it, ids of the text's sources)."""

ROW_NUMBER = re.compile(r"[:#][0-9]+(?:~[0-9]+)?$")
SUBJECT_FILE = re.compile(r"(\w+)_(dev|val|test)\.csv")


@dataclass(frozen=True)
class Found:
    place: str
    """File, or member of an archive."""
    number: int
    """Row of the place, from 0."""
    record: Any


def load_exam(
    test: str | list[str], fewshot: str | list[str] = (), columns: dict[str, str] | None = None,
    retrieve: Retrieve | None = None, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """Exam files as splits "test" and "fewshot", and the number of unusable rows by reason as "skipped".

    Arguments come from the metadata of a task file, or stand in for it.
    UserError: a test file is missing or holds no usable question. Missing worked examples are left out: a task that
    asks for none runs without them.
    """
    found, skipped = _read("exam", test, columns)
    asked = _with_context([_question_row(each) for each in found], retrieve)
    shots = [_question_row(each) for each in _read("exam", _existing(fewshot), columns)[0]]
    return {"test": _dataset(asked, test), "fewshot": Dataset.from_list(shots), "skipped": skipped}


def load_explained_exam(test: str | list[str], **settings: Any) -> dict[str, Any]:
    """As `load_exam`, only the questions that have a reference explanation."""
    splits = load_exam(test, **settings)
    explained = [index for index, text in enumerate(splits["test"]["explanation"]) if text]
    if not explained:
        raise UserError(f"{_listed(test)}: no question has an explanation; name a file that tells explanations")
    unexplained = {"no explanation": len(splits["test"]) - len(explained)}
    skipped = splits["skipped"] | {reason: count for reason, count in unexplained.items() if count}
    return {**splits, "test": splits["test"].select(explained), "skipped": skipped}


def load_ceval(
    test: str | list[str], split: str = "val", columns: dict[str, str] | None = None, retrieve: Retrieve | None = None,
    **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """C-Eval's archive or folder as one split "all": the questions of `split`, and dev's as worked examples.

    `role` tells them apart; `number` is the official id, a question's place in its subject's file.
    """
    rows = []
    found, skipped = _read("exam", test, columns)
    for each in found:
        match = SUBJECT_FILE.search(each.place)
        if match and match[1] in SUBJECTS and match[2] in ("dev", split):
            name, category = SUBJECTS[match[1]]
            role = "shot" if match[2] == "dev" else "asked"
            about = {"role": role, "subject": match[1], "subject_name": name, "category": category}
            rows.append({**_question_row(each), **about})
    if not any(row["role"] == "asked" for row in rows):
        raise UserError(f"{_listed(test)}: no C-Eval questions; expected files such as {split}/physician_{split}.csv")
    asked = _with_context([row for row in rows if row["role"] == "asked"], retrieve)
    shots = [{**row, "context": "", "sources": []} for row in rows if row["role"] == "shot"]
    return {"all": _dataset([*asked, *shots], test), "skipped": skipped}


def asked_questions(rows: Dataset) -> Dataset:
    return rows.select([index for index, role in enumerate(rows["role"]) if role == "asked"])


def worked_examples(rows: Dataset) -> Dataset:
    return rows.select([index for index, role in enumerate(rows["role"]) if role == "shot"])


def load_consultations(
    test: str | list[str], columns: dict[str, str] | None = None, retrieve: Retrieve | None = None, **_: Any
) -> dict[str, Any]:
    """Huatuo-26M's questions with the first answer of each as split "test"."""
    found, skipped = _read("huatuo", test, columns)
    rows = _with_context([_consultation_row(each) for each in found], retrieve)
    return {"test": _dataset(rows, test), "skipped": skipped}


# --------------------------------------------------------------------------------------------------------- rows


def _question_row(found: Found) -> Row:
    question: Question = found.record
    return {
        "id": question.id, "number": found.number, "stem": question.stem,
        "letters": "".join(letter for letter, _ in question.options),
        "options": [text for _, text in question.options], "answer": question.answer,
        "explanation": question.explanation, "facets": [list(facet) for facet in question.facets],
        "context": "", "sources": [],
    }  # fmt: skip


def _consultation_row(found: Found) -> Row:
    chat: Chat = found.record
    question, answer = chat.messages[-2:]
    return {
        "id": chat.id, "number": found.number, "stem": question.content, "answer": answer.content, "context": "", "sources": [],
    }  # fmt: skip


def _with_context(rows: list[Row], retrieve: Retrieve | None) -> list[Row]:
    if retrieve is None:
        return rows
    found = retrieve([(row["stem"], lettered(row) if "options" in row else []) for row in rows])
    return [{**row, "context": text, "sources": ids} for row, (text, ids) in zip(rows, found, strict=True)]


def _dataset(rows: list[Row], paths: str | list[str]) -> Dataset:
    if not rows:
        raise UserError(f"{_listed(paths)}: no usable question; look at the files, or map their columns")
    return Dataset.from_list(rows)


# -------------------------------------------------------------------------------------------------------- files


def _read(kind: Kind, paths: str | Iterable[str], columns: dict[str, str] | None) -> tuple[list[Found], dict[str, int]]:
    """The usable rows of all files, and how many were skipped for which reason."""
    if not (paths := _listed(paths)):
        return [], {}
    source = RawFiles(name=kind, kind=kind, paths=paths, columns=columns or {})
    found, reasons, rows_of = [], Counter(), Counter()
    for rows, record in (counted for file in raw_files(source) for counted in read_raw(source, file)):
        place = ROW_NUMBER.split(record.id)[0]
        rows_of[place] += rows
        if isinstance(record, Skipped):
            reasons[record.reason] += rows
        elif rows:  # a further record of the same row has none
            found.append(Found(place, rows_of[place] - 1, record))
    return found, dict(reasons)


def _listed(paths: str | Iterable[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _existing(paths: str | Iterable[str]) -> list[str]:
    return [path for path in _listed(paths) if Path(path).exists()]
