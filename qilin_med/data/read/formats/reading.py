"""What the formats share: a row's fields are checked and become records, or the row is skipped with the reason."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.expressions import mapped
from qilin_med.data.read.files import Part
from qilin_med.data.read.raw import RawRow, UnusableRow
from qilin_med.data.read.tables import ROW_SUFFIXES, read_rows
from qilin_med.records import RAW_CHARACTERS, AnyRecord, Skipped

Counted = tuple[int, AnyRecord | Skipped]
Fields = dict[str, Any]
"""A row as parsed, under the kind's own names."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Reader:
    """How a kind is read: a part becomes records, each with the number of raw rows it stands for."""

    read: Callable[[Part, RawFiles], Iterator[Counted]]
    fields: tuple[str, ...]
    """The kind's own field names, which `columns` may map."""
    suffixes: tuple[str, ...] = ROW_SUFFIXES
    begins: Callable[[str, RawFiles], Callable[[str], Any] | None] = lambda suffix, source: str
    """Whether a record may begin with a line, for a kind of file; None if a file has to be read from its start. (`str`:
    any line that is not empty, which is how a record may begin where rows stand for themselves.)"""
    keeps_others: bool = False
    """`columns` may map further names, which the records keep."""


def row_reader(
    *fields: str,
    suffixes: tuple[str, ...] = ROW_SUFFIXES,
    objects: bool = True,
    columns: dict[str, str] | None = None,
    rows: str = "",
) -> Callable[[Callable[[str, Any], Any]], Reader]:
    """Makes a function the reader of a kind in which every row makes its records by itself.

    The function is given a row's id and value, an object unless `objects` is false; it raises UnusableRow, or returns
    one record or several, never none. `columns` and `rows` are the kind's own, after and in place of the source's.
    """

    def reader_of(convert: Callable[[str, Any], Any]) -> Reader:
        def read(part: Part, source: RawFiles) -> Iterator[Counted]:
            for row in read_rows(part, source.rows or rows, source.header):
                yield from convert_row(row, (source.columns, columns or {}), convert, fields, objects)

        # Neither values of an object nor elements of these values can be told apart from within.
        return Reader(read, fields, suffixes, begins=lambda suffix, source: None if "*" in rows else str)

    return reader_of


def convert_row(
    row: RawRow,
    columns: Iterable[dict[str, str]],
    convert: Callable[[str, Any], Any],
    fields: tuple[str, ...] = (),
    objects: bool = True,
) -> Iterator[Counted]:
    """The records of a row, of which only the first stands for it, or the row skipped."""
    try:
        if row.fault:
            raise UnusableRow(row.fault)
        value = row.value
        for names in columns:
            value = mapped(value, names)
        if objects and not isinstance(value, dict):
            raise UnusableRow(f"unknown layout: the row is {name_of(value)}, expected an object")
        records = convert(row.id, value)
    except (UnusableRow, RecursionError) as error:
        reason = str(error) if isinstance(error, UnusableRow) else "nested too deep"
        if reason.startswith("unknown layout"):
            reason = layout_reason(reason, row.value, fields)
        yield 1, skipped(row.id, reason, row.value if row.text is None else row.text)
        return
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        yield int(number == 0), record


def skipped(id_: str, reason: str, raw: Any) -> Skipped:
    """`raw` is the row's text, or the row as parsed."""
    try:
        text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
    except RecursionError:
        text = "nested too deep to be shown"
    return Skipped(id_, reason, LONE_SURROGATE.sub("\ufffd", text[:RAW_CHARACTERS]))


# -------------------------------------------------------------------------------------------------------- fields


def plain_text(value: Any, field: str) -> str:
    """Text without surrounding white space; lists of one text (Huatuo-26M) are taken as that text, null as none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnusableRow(f"wrong type: '{field}' is {name_of(value)}, expected text")
    if LONE_SURROGATE.search(value):
        raise UnusableRow("not Unicode: half a surrogate pair")
    return value.strip()


def field_text(row: Fields, field: str) -> str:
    """The plain text of a field, "" where the row has none."""
    return plain_text(row.get(field), field)


def texts_of(value: Any, field: str) -> list[str]:
    """The texts of a text or a list of texts, also nested, without surrounding white space and without empty ones."""
    if not isinstance(value, list):
        return [text] if (text := plain_text(value, field)) else []
    found: list[str] = []
    for part in value:
        found += texts_of(part, field) if isinstance(part, list) else [plain_text(part, field)]
    return list(dict.fromkeys(text for text in found if text))


def name_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), "null")


def unknown_layout(row: Any, expected: str) -> UnusableRow:
    """Reason with the fields that the row has."""
    found = f"fields {', '.join(map(str, list(row)[:12])) or 'none'}" if isinstance(row, dict) else name_of(row)
    return UnusableRow(f"unknown layout: {found}; expected {expected}")


# Other names of fields in published files, for hints.
SYNONYMS = {
    "question": ("question", "query", "ask", "prompt", "q", "problem", "stem", "instruction", "input", "title", "content",
                 "问题", "问", "题目", "题干", "提问"),
    "answer": ("answer", "response", "reply", "output", "target", "a", "completion", "solution", "label", "answer_idx", "cop",
               "回答", "答案", "答", "回复"),
    "options": ("options", "option", "choices", "candidates", "选项"),
    "explanation": ("explanation", "analysis", "rationale", "解析", "解释"),
    "conversations": ("conversations", "dialog", "dialogue", "dialogues", "turns", "data", "messages", "对话"),
    "text": ("text", "content", "body", "passage", "paragraph", "document", "正文", "内容", "文本"),
    "response_chosen": ("chosen", "preferred", "better", "win", "positive"),
    "response_rejected": ("rejected", "dispreferred", "worse", "lose", "negative"),
    "head": ("head", "subject", "entity1", "头实体"), "relation": ("relation", "predicate", "关系"),
    "tail": ("tail", "object", "entity2", "尾实体"), "name": ("name", "disease", "疾病", "名称"),
    "desc": ("desc", "description", "summary", "简介"),
}  # fmt: skip


def layout_reason(reason: str, row: Any, fields: tuple[str, ...]) -> str:
    """The reason with the fields found and expected, and what of a corpus file's `columns` and `rows` would help."""
    if ":" not in reason:
        reason = str(unknown_layout(row, ", ".join(fields[:12])))
    columns = {field: path for field in fields if (path := _path_to(SYNONYMS.get(field, ()), row)) not in ("", field)}
    lists = [name for name, value in row.items() if _holds_objects(value)] if isinstance(row, dict) else []
    hints = [f"columns {json.dumps(columns, ensure_ascii=False)}"] if columns else []
    hints += [f'rows "{name}"' for name in lists]
    return f"{reason}; in a corpus file this may help: {' or '.join(hints)}" if hints else reason


def _path_to(names: tuple[str, ...], row: Any) -> str:
    """The first of the names that the row has, also inside an object of it."""
    if not isinstance(row, dict):
        return ""
    inside = {f"{outer}.{key}": key for outer, value in row.items() if isinstance(value, dict) for key in value}
    found = {**{key: key for key in row}, **inside}
    return next((path for name in names for path, key in found.items() if str(key).lower() == name), "")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(entry, dict) for entry in value)
