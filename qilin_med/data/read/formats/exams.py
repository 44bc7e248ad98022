"""Exam questions: CMExam and its copies, C-Eval."""

import re
import unicodedata
from collections.abc import Iterator
from functools import partial
from string import ascii_uppercase
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, UnusableRow
from qilin_med.data.read.formats.reading import Counted, Reader, convert_row, rename, unknown_layout
from qilin_med.data.read.records import plain_text
from qilin_med.data.read.tables import read_rows
from qilin_med.records import Question

LETTERS = "ABCDEFGHIJ"
FACETS = ("Disease Group", "Area of Competency", "Clinical Department", "Medical Discipline", "Difficulty level")
# Names of published copies, beside the kind's own.
ALIASES = {"question": ("question", "problem_text"), "options": ("options", "choices"), "answer": ("answer",)}
OPTION = re.compile(r"\s*([A-JＡ-Ｊ])(?:[.．、:：)）]\s*|\s+|$)(.*)")
SEPARATORS = re.compile(r"[\s,，、;；.．。/|]+")

Options = list[tuple[str, str]]


def _read(part: Part, source: RawFiles) -> Iterator[Counted]:
    objects = (row.value for row in read_rows(part) if isinstance(row.value, dict))
    answered = any(_answer_of(rename(row, source.columns)) for row in objects)
    for row in read_rows(part):
        yield from convert_row(row, source.columns, partial(_question, answered))


def _question(answered: bool, id_: str, row: dict[str, Any]) -> Question:
    """`answered`: the file tells answers, so a row without one is broken (test sets tell none)."""
    # Where line breaks of the options are written as two characters, so are the others.
    given = _field(row, "options")
    escaped = isinstance(given, str) and "\\n" in given
    stem = _text(_field(row, "question"), escaped)
    if not stem:
        raise UnusableRow("no stem")
    options = _options(row)
    answer = _letters(_answer_of(row))
    if answered and not answer:
        raise UnusableRow("no answer")
    if not set(answer) <= {letter for letter, _ in options}:
        raise UnusableRow("answer is not among the options")
    explanation = _text(_named(row, "explanation"), escaped)
    facets = tuple((name, value) for name in FACETS if (value := _cell(_named(row, name))))
    return Question(id_, stem, tuple(options), answer, explanation, facets)


def _field(row: dict[str, Any], field: str) -> Any:
    return next((value for alias in ALIASES[field] if (value := _named(row, alias)) is not None), None)


def _named(row: dict[str, Any], name: str) -> Any:
    """The value under a name, however it is capitalised."""
    if name in row:
        return row[name]
    return next((value for key, value in row.items() if key.lower() == name.lower()), None)


def _cell(value: Any) -> str:
    text = plain_text(str(value) if isinstance(value, int | float) else value, "cell")
    # What pandas writes for an empty cell.
    return "" if text.lower() == "nan" else text


def _text(value: Any, escaped: bool) -> str:
    return _cell(value).replace("\\n", "\n").strip() if escaped else _cell(value)


# ------------------------------------------------------------------------------------------------------- options


def _options(row: dict[str, Any]) -> Options:
    given = _field(row, "options")
    if isinstance(given, str):
        options = _options_of_text(given)
    elif isinstance(given, list) and len(given) <= len(LETTERS):
        options = [(letter, _cell(text)) for letter, text in zip(LETTERS, given, strict=False)]
    elif isinstance(given, dict):
        options = _filled_options({_upper(str(key)): text for key, text in given.items()})
    else:
        options = _filled_options(row)
    return _checked_options(options)


def _options_of_text(text: str) -> Options:
    """Options one a line; some files write a line break as the two characters \\n."""
    options: Options = []
    for line in _cell(text).replace("\\n", "\n").split("\n"):
        if match := OPTION.fullmatch(line):
            options.append((_upper(match[1]), match[2].strip()))
        elif options:
            letter, before = options[-1]
            options[-1] = (letter, f"{before}\n{line.strip()}".strip())
        elif line.strip():
            raise UnusableRow("options without letters")
    return options


def _filled_options(cells: dict[str, Any]) -> Options:
    """Options of columns A, B, ...; the last columns are blank where a question has fewer options."""
    options = [(letter, _cell(cells[letter])) for letter in LETTERS if letter in cells]
    while options and not options[-1][1]:
        options.pop()
    return options


def _checked_options(options: Options) -> Options:
    if not options:
        raise UnusableRow("no options")
    if len({letter for letter, _ in options}) < len(options):
        raise UnusableRow("an option letter is given twice")
    if not all(text for _, text in options):
        raise UnusableRow("empty option")
    return options


# ------------------------------------------------------------------------------------------------------- answers


def _answer_of(row: dict[str, Any]) -> Any:
    """The cell or list, or what stands for no answer: "" or []."""
    value = _field(row, "answer")
    if isinstance(value, list):
        return [part for part in value if part not in (None, "")]
    return "" if value is None or str(value).strip().lower() in ("", "nan") else value


def _letters(answer: Any) -> str:
    parts = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(part, str) for part in parts):
        raise unknown_layout()
    letters = SEPARATORS.sub("", _upper("".join(parts)))
    if not set(letters) <= set(ascii_uppercase):
        raise UnusableRow("answer is no letter")
    return "".join(sorted(set(letters)))


def _upper(text: str) -> str:
    """Upper-case letters, also for full-width ones."""
    return unicodedata.normalize("NFKC", text).upper()


EXAM = Reader(_read, ("question", "options", *LETTERS, "answer", "explanation", *FACETS))
