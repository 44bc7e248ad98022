"""Exam questions, whichever way options and answers are written."""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from string import ascii_uppercase
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.expressions import mapped
from qilin_med.data.read.files import Part
from qilin_med.data.read.formats.reading import Counted, Fields, Reader, UnusableRow, convert_row, plain_text
from qilin_med.data.read.tables import read_rows
from qilin_med.records import LETTER, LETTERS, MARK, Question

FACETS = ("Disease Group", "Area of Competency", "Clinical Department", "Medical Discipline", "Difficulty level")
FIELDS = ("question", "options", *LETTERS, "answer", "explanation", *FACETS)
OPTION = re.compile(rf"\s*({LETTER})(?:{MARK}\s*|\s+|$)(.*)")
MARKED = re.compile(rf"\s*({LETTER}){MARK}\s*(.*)", re.DOTALL)
# Several options on a line, at best with something between them.
INLINE = tuple(re.compile(rf"{before}({LETTER}){MARK}") for before in (r"(?:^|[\s;；,，|/])", ""))
COLUMN = re.compile(r"(?:op|opt|option|choice|选项)[ _-]?([A-J])|([A-J])", re.IGNORECASE)
NUMBER = re.compile(r"(\d{1,9})(?:\.0+)?")  # "1.0" in a column of numbers with gaps
SEPARATORS = re.compile(r"[\s,，、;；.．。/|]+")
LABELS, TEXTS = ("key", "label", "letter", "id", "option"), ("value", "text", "content")

Options = list[tuple[str, str, str]]
"""(letter, text, the file's own name of the option)."""


def _read(part: Part, source: RawFiles) -> Iterator[Counted]:
    answered, first = _survey(replace(part, span=None), source)
    names = [*FACETS, *(name for name in source.columns if name not in FIELDS)]
    for row in read_rows(part, source.rows, source.header):
        yield from convert_row(row, (source.columns,), partial(_question, answered, first, names), FIELDS)


def _survey(part: Part, source: RawFiles) -> tuple[bool, int | None]:
    """(whether the file tells answers: a question without one is then broken, while test sets have none at all; the number
    of the first option where answers are numbers, None where they do not show it)."""
    answered, seen = False, set()
    for row in read_rows(part, source.rows, source.header):
        with suppress(UnusableRow, RecursionError):
            fields = mapped(row.value, source.columns)
            if row.fault or not isinstance(fields, dict) or not (answer := _answer_of(fields)):
                continue
            answered, told = True, [NUMBER.fullmatch(_cell(part)) for part in answer]
            if not all(told):
                return True, None
            numbers = {int(number[1]) for number in told}
            seen |= ({0} & numbers) | ({1} if len(_options(fields)) in numbers else set())
    return answered, seen.pop() if len(seen) == 1 else None


def _question(answered: bool, first: int | None, names: list[str], id_: str, row: Fields) -> Question:
    given = _value(row, "options", "option", "choices")
    # Where line breaks of the options are written as two characters, so are the others.
    escaped = isinstance(given, str) and "\\n" in given

    def told(*names: str) -> str:
        text = _cell(_value(row, *names))
        return text.replace("\\n", "\n").strip() if escaped else text

    stem = told("question", "problem_text")
    if not stem:
        is_named = any(key.lower() in ("question", "problem_text") for key in row)
        raise UnusableRow("no stem" if is_named else "unknown layout")
    options = _options(row)
    answer = "".join(sorted({letter for part in _answer_of(row) for letter in _letters_of(part, options, first)}))
    if answered and not answer:
        raise UnusableRow("no answer")
    if not set(answer) <= {letter for letter, _, _ in options}:
        raise UnusableRow("answer is not among the options")
    facets = tuple((name, value) for name in names if (value := _cell(_value(row, name))))
    return Question(
        id_, stem, tuple((letter, text) for letter, text, _ in options), answer, told("explanation"), facets
    )


def _value(row: Fields, *names: str) -> Any:
    """The first value under one of the names, however they are capitalised."""
    for name in names:
        key = name if name in row else next((key for key in row if key.lower() == name.lower()), name)
        if row.get(key) is not None:
            return row[key]
    return None


def _cell(value: Any) -> str:
    """Text of a cell; numbers as they are written, lists joined."""
    if isinstance(value, list):
        value = "、".join(map(_cell, value))
    text = plain_text(str(value) if isinstance(value, int | float) else value, "cell")
    # What pandas writes for an empty cell.
    return "" if text.lower() == "nan" else text


def _options(row: Fields) -> Options:
    """Of one text, a list, an object by letters or other names, or the columns A, B, ..., opa, opb, ..."""
    given = _value(row, "options", "option", "choices")
    if isinstance(given, str):
        options = _in_text(_cell(given).replace("\\n", "\n"))
    else:
        if isinstance(given, list) and len(given) <= len(LETTERS):
            given = _by_name(given)
        if isinstance(given, dict):
            named = {_upper(str(key)): (str(key), text) for key, text in given.items()}
        else:
            matches = ((COLUMN.fullmatch(str(key)), key) for key in row)
            named = {_upper(match[1] or match[2]): (key, row[key]) for match, key in matches if match}
            given = {}
        if set(named) & set(LETTERS):
            options = [(letter, _cell(named[letter][1]), named[letter][0]) for letter in LETTERS if letter in named]
        else:
            entries = zip(LETTERS, given.items(), strict=False)
            options = [(letter, _cell(text), str(key).strip()) for letter, (key, text) in entries]
        # The last are blank where a question has fewer options.
        while options and not options[-1][1] and not isinstance(_value(row, "options", "option", "choices"), list):
            options.pop()
    if not options:
        raise UnusableRow("no options")
    if len({letter for letter, _, _ in options}) < len(options):
        raise UnusableRow("an option letter is given twice")
    if not all(text for _, text, _ in options):
        raise UnusableRow("empty option")
    return options


def _by_name(given: list[Any]) -> dict[str, Any]:
    """A list of texts, with letters or without, of {key, value}, of {letter: text} or of [letter, text] as one object."""
    if given and all(isinstance(entry, dict) for entry in given):
        if all(len(entry) == 1 for entry in given):
            given = [pair for entry in given for pair in entry.items()]
        else:
            given = [(_value(entry, *LABELS), _value(entry, *TEXTS, *LABELS[-1:])) for entry in given]
    elif not all(isinstance(entry, list) and len(entry) == 2 for entry in given):
        texts = [_cell(entry) for entry in given]
        marked = [MARKED.fullmatch(text) for text in texts]
        if not all(match and _upper(match[1]) == letter for match, letter in zip(marked, LETTERS, strict=False)):
            return dict(zip(LETTERS, texts, strict=False))
        given = [(match[1], match[2]) for match in marked]
    names = [str(name) for name, _ in given]
    if len(set(names)) < len(names):
        raise UnusableRow("an option letter is given twice")
    return dict(zip(names, (text for _, text in given), strict=True))


def _in_text(text: str) -> Options:
    """Options a line, or all on one line; without letters they are counted in order."""
    lines = [line for line in text.split("\n") if line.strip()]
    matches = [OPTION.fullmatch(line) for line in lines]
    if len(lines) > 1 and not any(matches):
        return [(letter, line.strip(), letter) for letter, line in zip(LETTERS, lines, strict=False)]
    options: list[list[str]] = []
    for line, match in zip(lines, matches, strict=True):
        if match:
            options.append([_upper(match[1]), match[2].strip()])
        elif options:
            options[-1][1] = f"{options[-1][1]}\n{line.strip()}".strip()
        else:
            raise UnusableRow("options without letters")
    # Letters that are missing from the beginnings of lines stand within them.
    if len(options) == 1 or {letter for letter, _ in options} != set(LETTERS[: len(options)]):
        for pattern in INLINE:
            start, *pieces = pattern.split(text)
            letters, texts = "".join(map(_upper, pieces[::2])), [piece.strip(" \t\n;；,，|/") for piece in pieces[1::2]]
            if not start.strip() and len(letters) > 1 and letters == LETTERS[: len(letters)]:
                return list(zip(letters, texts, letters, strict=True))
        if len(options) == 1 and len(letters) > 1:
            raise UnusableRow("options cannot be told apart")
    return [(letter, text, letter) for letter, text in options]


def _answer_of(row: Fields) -> list[Any]:
    """The cells that tell it, none where it is not told."""
    value = _value(row, "answer")
    if isinstance(value, list):
        return [part for part in value if part not in (None, "")]
    return [] if value is None or str(value).strip().lower() in ("", "nan") else [value]


def _letters_of(part: Any, options: Options, first: int | None) -> str:
    """The letters of an answer, or of a part of one, that is given as letters, by number, or as the text or the name of
    options."""
    if not isinstance(part, str | int | float) or isinstance(part, bool):
        raise UnusableRow("unknown layout")
    text = _cell(part)
    told = "".join(letter for letter, *names in options if text in names)
    letters = SEPARATORS.sub("", _upper(text))
    if set(letters) <= {letter for letter, _, _ in options} and (told in ("", letters) or len(letters) < 2):
        return letters
    if len(told) > 1:
        raise UnusableRow("answer is the text of several options")
    if (number := NUMBER.fullmatch(text)) and not (told and isinstance(part, str)):
        if first is None:
            raise UnusableRow("answer is a number, counted from 0 or from 1")
        place = int(number[1]) - first
        counted = options[place][0] if 0 <= place < len(options) else ""
        if not counted or told not in ("", counted):
            raise UnusableRow("answer is not among the options")
        return counted
    if told and not (len(letters) > 1 and set(letters) <= {letter for letter, _, _ in options}):
        return told
    if told:
        raise UnusableRow("answer is letters, and the text of another option")
    if not set(letters) <= set(ascii_uppercase):
        raise UnusableRow("answer is no letter")
    return letters


def _upper(text: str) -> str:
    """Upper-case letters, also for full-width ones."""
    return unicodedata.normalize("NFKC", text).upper()


EXAM = Reader(_read, FIELDS, keeps_others=True)
