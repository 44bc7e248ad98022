"""What the formats share: a reader takes a part and yields each record with the number of raw rows it stands for."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, UnusableRow, skipped
from qilin_med.data.read.records import plain_text
from qilin_med.data.read.tables import ROW_SUFFIXES, Row, read_rows
from qilin_med.records import Chat, Document, Preference, Question, Skipped

Record = Document | Chat | Preference | Question
Counted = tuple[int, Record | Skipped]
Convert = Callable[[str, Any], Record | list[Record]]


@dataclass(frozen=True, slots=True)
class Reader:
    """How a kind is read."""

    read: Callable[[Part, RawFiles], Iterator[Counted]]
    fields: tuple[str, ...]
    """The kind's own field names, which `columns` may map."""
    suffixes: tuple[str, ...] = ROW_SUFFIXES


def row_reader(convert: Convert, fields: tuple[str, ...], *, objects: bool = True, nested: bool = False) -> Reader:
    """A reader of a kind in which every row makes its records by itself.

    `convert` raises UnusableRow with the reason, or returns one record or several, never none. It is given objects
    alone, unless `objects` is false; `nested`: see `read_rows`.
    """

    def read(part: Part, source: RawFiles) -> Iterator[Counted]:
        for row in read_rows(part, nested):
            yield from convert_row(row, source.columns, convert, objects)

    return Reader(read, fields)


def convert_row(row: Row, columns: dict[str, str], convert: Convert, objects: bool = True) -> Iterator[Counted]:
    """The records of a row, of which only the first stands for it, or the row skipped."""
    try:
        records = convert(row.id, _usable(row, columns, objects))
    except UnusableRow as error:
        yield 1, skipped(row.id, short_reason(error), row.value if row.text is None else row.text)
        return
    except RecursionError:
        yield 1, skipped(row.id, "nested too deep", row.text or "")
        return
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        yield int(number == 0), record


def _usable(row: Row, columns: dict[str, str], objects: bool) -> Any:
    if row.fault:
        raise UnusableRow(row.fault)
    if isinstance(row.value, dict):
        return rename(row.value, columns)
    if objects:
        raise unknown_layout()
    return row.value


def rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row with the kind's own names for the columns that `columns` maps."""
    given = {field: row[column] for field, column in columns.items() if column in row}
    return {**row, **given}


def short_reason(error: UnusableRow) -> str:
    """The reason without what the row says, so that reasons can be counted."""
    return re.split(r'[:"]| null$', str(error))[0].strip()


def unknown_layout() -> UnusableRow:
    return UnusableRow("unknown layout")


def texts_of(value: Any, field: str) -> list[str]:
    """The texts of a text or a list of texts, also nested, without surrounding white space and without empty ones."""
    parts = value if isinstance(value, list) else [value]
    found: list[str] = []
    for part in parts:
        found += texts_of(part, field) if isinstance(part, list) else [plain_text(part, field)]
    return list(dict.fromkeys(text for text in found if text))
