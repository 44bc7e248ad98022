"""Exam questions: CMExam and its copies, C-Eval."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from string import ascii_uppercase
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part
from qilin_med.data.read.formats.reading import Counted, Fields, Reader, UnusableRow, convert_row, plain_text, rename
from qilin_med.data.read.tables import read_rows
from qilin_med.records import Question

LETTERS = "ABCDEFGHIJ"
FACETS = ("Disease Group", "Area of Competency", "Clinical Department", "Medical Discipline", "Difficulty level")
OPTION = re.compile(r"\s*([A-JＡ-Ｊ])(?:[.．、:：)）]\s*|\s+|$)(.*)")
SEPARATORS = re.compile(r"[\s,，、;；.．。/|]+")


def _read(part: Part, source: RawFiles) -> Iterator[Counted]:
    whole = replace(part, span=None)
    objects = (row.value for row in read_rows(whole) if isinstance(row.value, dict))
    # In a file with answers, a question without one is broken; test sets have none at all.
    answered = any(_answer_of(rename(row, source.columns)) for row in objects)
    for row in read_rows(part):
        yield from convert_row(row, source.columns, partial(_question, answered))


def _question(answered: bool, id_: str, row: Fields) -> Question:
    given = _value(row, "options", "choices")
    # Where line breaks of the options are written as two characters, so are the others.
    escaped = isinstance(given, str) and "\\n" in given

    def told(*names: str) -> str:
        text = _cell(_value(row, *names))
        return text.replace("\\n", "\n").strip() if escaped else text

    stem = told("question", "problem_text")
    if not stem:
        raise UnusableRow("no stem")
    options = _options(given, row)
    answer = _letters(_answer_of(row))
    if answered and not answer:
        raise UnusableRow("no answer")
    if not set(answer) <= {letter for letter, _ in options}:
        raise UnusableRow("answer is not among the options")
    explanation = told("explanation")
    facets = tuple((name, value) for name in FACETS if (value := _cell(_value(row, name))))
    return Question(id_, stem, tuple(options), answer, explanation, facets)


def _value(row: Fields, *names: str) -> Any:
    """The first value under one of the names, however they are capitalised."""
    for name in names:
        key = name if name in row else next((key for key in row if key.lower() == name.lower()), name)
        if row.get(key) is not None:
            return row[key]
    return None


def _cell(value: Any) -> str:
    text = plain_text(str(value) if isinstance(value, int | float) else value, "cell")
    # What pandas writes for an empty cell.
    return "" if text.lower() == "nan" else text


def _options(given: Any, row: Fields) -> list[tuple[str, str]]:
    """(letter, text) of one text, a list, an object by letters, or the columns A, B, ..."""
    options: list[tuple[str, str]] = []
    if isinstance(given, str):
        for line in _cell(given).replace("\\n", "\n").split("\n"):
            if match := OPTION.fullmatch(line):
                options.append((_upper(match[1]), match[2].strip()))
            elif options:
                letter, before = options[-1]
                options[-1] = (letter, f"{before}\n{line.strip()}".strip())
            elif line.strip():
                raise UnusableRow("options without letters")
    elif isinstance(given, list) and len(given) <= len(LETTERS):
        options = [(letter, _cell(text)) for letter, text in zip(LETTERS, given, strict=False)]
    else:
        cells = {_upper(str(key)): text for key, text in given.items()} if isinstance(given, dict) else row
        options = [(letter, _cell(cells[letter])) for letter in LETTERS if letter in cells]
        # The last are blank where a question has fewer options.
        while options and not options[-1][1]:
            options.pop()
    if not options:
        raise UnusableRow("no options")
    if len({letter for letter, _ in options}) < len(options):
        raise UnusableRow("an option letter is given twice")
    if not all(text for _, text in options):
        raise UnusableRow("empty option")
    return options


def _answer_of(row: Fields) -> Any:
    """The cell or list, or what stands for no answer: "" or []."""
    value = _value(row, "answer")
    if isinstance(value, list):
        return [part for part in value if part not in (None, "")]
    return "" if value is None or str(value).strip().lower() in ("", "nan") else value


def _letters(answer: Any) -> str:
    parts = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(part, str) for part in parts):
        raise UnusableRow("unknown layout")
    letters = SEPARATORS.sub("", _upper("".join(parts)))
    if not set(letters) <= set(ascii_uppercase):
        raise UnusableRow("answer is no letter")
    return "".join(sorted(set(letters)))


def _upper(text: str) -> str:
    """Upper-case letters, also for full-width ones."""
    return unicodedata.normalize("NFKC", text).upper()


EXAM = Reader(_read, ("question", "options", *LETTERS, "answer", "explanation", *FACETS))
