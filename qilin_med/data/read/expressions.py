"""JMESPath expressions over rows: `columns` and `rows` of a source bring a file's own shape to the fields of its kind."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jmespath
from jmespath import functions
from jmespath.exceptions import JMESPathError

from qilin_med.data.read.raw import RawRow, UnusableRow
from qilin_med.errors import UserError
from qilin_med.records import LETTERS


class _Functions(functions.Functions):
    """JMESPath's own functions and three that published files ask for."""

    @functions.signature({"types": ["string", "null"]}, {"types": ["string"]})
    def _func_split(self, text: str | None, separator: str) -> list[str] | None:
        return None if text is None else [part.strip() for part in text.split(separator)]

    @functions.signature({"types": ["array", "null"]})
    def _func_first(self, values: list[Any] | None) -> Any:
        """The first value of a list, also nested, that is not blank; "" where all are, null where all are null."""
        found = "" if values == [] else None
        for value in values or []:
            value = self._func_first(value) if isinstance(value, list) else value
            if value is not None and str(value).strip():
                return value
            found = "" if isinstance(value, str) else found
        return found

    @functions.signature({"types": ["number", "string"]}, {"types": ["number"]})
    def _func_letter(self, index: float | str, start: float) -> str | None:
        """Of an answer's index, counted from `start`."""
        number = str(index).strip().removesuffix(".0")
        place = int(number) - int(start) if number.isdigit() else -1
        return LETTERS[place] if 0 <= place < len(LETTERS) else None


OPTIONS = jmespath.Options(custom_functions=_Functions())


@lru_cache(maxsize=1000)
def _compiled(expression: str) -> Any:
    return jmespath.compile(expression)


def check_expression(source: str, place: str, expression: str) -> None:
    """UserError: it is no JMESPath, and no name that a column may have."""
    try:
        _compiled(expression)
    except JMESPathError as error:
        if place == "rows" or any(sign in expression for sign in "[]{}|&*@`"):
            reason = str(error).splitlines()[0]
            raise UserError(
                f"source '{source}': {place} is '{expression}', which is no JMESPath expression: {reason}"
            ) from None


def find(expression: str, value: Any) -> Any:
    """The column of this name, else what the expression finds, null if nothing. UnusableRow: it does not fit the row."""
    if isinstance(value, dict) and expression in value:
        return value[expression]
    try:
        return _compiled(expression).search(value, OPTIONS)
    except (JMESPathError, ValueError) as error:
        if isinstance(error, jmespath.exceptions.ParseError):
            return None  # the name of a column that this row lacks
        raise UnusableRow(f"columns: '{expression}' does not fit the row: {str(error).splitlines()[0]}") from None


def mapped(row: Any, columns: dict[str, str]) -> Any:
    """The row with the kind's own names for what `columns` finds in it; unchanged where that is nothing."""
    if not columns:
        return row
    found = {field: value for field, column in columns.items() if (value := find(column, row)) is not None}
    return {**(row if isinstance(row, dict) else {}), **found} if found else row


def expanded(row: RawRow, expression: str) -> Iterator[RawRow]:
    """The records that `expression` lists in a row, each a row of its own, with the row's fields that are no lists. A row
    that lists none stays one, faulty row."""
    if row.fault:
        yield row
        return
    try:
        records = find(expression, row.value)
    except UnusableRow as error:
        yield row._replace(fault=str(error).replace("columns:", "rows:"))
        return
    records = records if isinstance(records, list) else [] if records is None else [records]
    if not records:
        yield row._replace(fault="no record: rows finds none in it")
    shared = row.value.items() if isinstance(row.value, dict) else ()
    shared = {name: value for name, value in shared if not isinstance(value, list)}
    for number, record in enumerate(records, 1):
        # A record may have several answers, which are numbered in their turn.
        id_ = f"{row.id}~{number}" if len(records) > 1 else row.id
        yield RawRow(id_, {**shared, **record} if isinstance(record, dict) else record)
