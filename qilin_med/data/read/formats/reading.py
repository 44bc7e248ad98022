"""What the formats share: a row's fields are checked and become records, or the row is skipped with the reason."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part
from qilin_med.data.read.tables import ROW_SUFFIXES, RawRow, read_rows
from qilin_med.records import RAW_CHARACTERS, AnyRecord, Skipped

Counted = tuple[int, AnyRecord | Skipped]
Fields = dict[str, Any]
"""A row as parsed, under the kind's own names."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class UnusableRow(ValueError):
    """Carries the reason for which a row is skipped: what makes reasons alike, then perhaps a colon and the details."""


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


def row_reader(
    *fields: str, suffixes: tuple[str, ...] = ROW_SUFFIXES, objects: bool = True, nested: bool = False
) -> Callable[[Callable[[str, Any], Any]], Reader]:
    """Makes a function the reader of a kind in which every row makes its records by itself.

    The function is given a row's id and value, an object unless `objects` is false; it raises UnusableRow, or returns
    one record or several, never none. `nested`: see `read_rows`.
    """

    def reader_of(convert: Callable[[str, Any], Any]) -> Reader:
        def read(part: Part, source: RawFiles) -> Iterator[Counted]:
            for row in read_rows(part, nested):
                yield from convert_row(row, source.columns, convert, objects)

        # Neither values of an object nor elements of these values can be told apart from within.
        return Reader(read, fields, suffixes, begins=lambda suffix, source: None if nested else str)

    return reader_of


def convert_row(
    row: RawRow, columns: dict[str, str], convert: Callable[[str, Any], Any], objects: bool = True
) -> Iterator[Counted]:
    """The records of a row, of which only the first stands for it, or the row skipped."""
    try:
        if row.fault:
            raise UnusableRow(row.fault)
        if objects and not isinstance(row.value, dict):
            raise UnusableRow(f"unknown layout: the row is {name_of(row.value)}, expected an object")
        records = convert(row.id, rename(row.value, columns))
    except (UnusableRow, RecursionError) as error:
        reason = str(error) if isinstance(error, UnusableRow) else "nested too deep"
        yield 1, skipped(row.id, reason, row.value if row.text is None else row.text)
        return
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        yield int(number == 0), record


def rename(row: Any, columns: dict[str, str]) -> Any:
    """An object with the kind's own names for the columns that `columns` maps."""
    if not columns or not isinstance(row, dict):
        return row
    return {**row, **{field: row[column] for field, column in columns.items() if column in row}}


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
    parts = value if isinstance(value, list) else [value]
    found: list[str] = []
    for part in parts:
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
    found = f"fields {', '.join(map(str, list(row)[:8])) or 'none'}" if isinstance(row, dict) else name_of(row)
    return UnusableRow(f"unknown layout: {found}; expected {expected}")
