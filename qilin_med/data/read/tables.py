"""Rows of JSON lines, JSON arrays and objects, .csv, .tsv, .xlsx and .parquet, streamed."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TextIO

import ijson
import orjson
from ijson.common import ObjectBuilder

from qilin_med.data.read.files import HEAD_BYTES, Part, decode_head, open_text, read_head, read_lines
from qilin_med.errors import UserError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
# A cell that long comes from a quotation mark that is never closed.
csv.field_size_limit(1 << 22)

Cells = list[str]


class Row(NamedTuple):
    """A row as it stands in the file."""

    id: str
    """Its place: "place:line" of lines and tables, "place#index" of arrays and .parquet."""
    value: Any
    """JSON: any value; tables: {column: text}."""
    text: str | None = None
    """The original line, where the row is one."""
    fault: str | None = None
    """Why the row could not be parsed."""


def read_rows(part: Part, nested: bool = False) -> Iterator[Row]:
    """All rows of a part, in order. Blank lines and rows of blank cells are no rows.

    A JSON object is one row; with `nested` its values are rows, and of values that are lists the elements.
    UserError: a .json that is neither lines nor a whole value; a broken .xlsx or .parquet.
    """
    if part.suffix in (".csv", ".tsv"):
        return _csv_rows(part, "\t" if part.suffix == ".tsv" else ",")
    if part.suffix == ".xlsx":
        return _xlsx_rows(part)
    if part.suffix == ".parquet":
        return (Row(f"{part.place}#{index}", value) for index, value in parquet_rows(part))
    start = read_head(part)
    head = decode_head(start).lstrip()
    if part.suffix == ".jsonl" or _holds_lines(head, len(start) < HEAD_BYTES, nested):
        return _json_lines(part)
    return _json_elements(part, _elements if nested and head.startswith("{") else _items(head))


# ---------------------------------------------------------------------------------------------------------- JSON


def _holds_lines(head: str, complete: bool, nested: bool) -> bool:
    """Whether a .json file holds JSON lines, as many published ones do: a first line that is whole, or, where the
    file is no single value, a later line that is an object (then the first line is broken)."""
    first, *rest = head.split("\n")
    if first.startswith("["):
        return is_json(first, list) and rest != [] and rest[0].lstrip().startswith("[")
    if is_json(first, dict):
        return not (nested and any(isinstance(value, list) for value in json.loads(first).values()))
    if nested or (complete and is_json(head, dict)):
        return False
    return any(line.startswith("{") and is_json(line, dict) for line in rest)


def is_json(text: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def _json_lines(part: Part) -> Iterator[Row]:
    for number, line in read_lines(part):
        value, fault = _parse(line)
        yield Row(f"{part.place}:{number}", value, line, fault)


def _parse(line: str) -> tuple[Any, str | None]:
    try:
        return orjson.loads(line), None
    except orjson.JSONDecodeError:
        pass
    # orjson refuses half surrogate pairs, NaN and long numbers, which one of a row's other fields may hold.
    try:
        return json.loads(line), None
    except (ValueError, RecursionError):
        return None, "broken JSON"


def _json_elements(part: Part, elements: Any) -> Iterator[Row]:
    index = 0
    with open_text(part) as stream:
        try:
            for value in elements(_Utf8(stream)):
                yield Row(f"{part.place}#{index}", value)
                index += 1
        except ijson.JSONError as error:
            message = " ".join(str(error).split())[:80]
            raise UserError(
                f"{part.place}: not valid JSON after {index} whole rows ({message}); expected one array of objects, one "
                "object, or an object a line"
            ) from None


class _Utf8:
    """What ijson reads: bytes that are UTF-8 whatever the file is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._stream.read(size).encode("utf-8")


def _items(head: str) -> Any:
    prefix = "item" if head.startswith("[") else ""
    return lambda stream: ijson.items(stream, prefix, use_float=True)


def _elements(stream: _Utf8) -> Iterator[Any]:
    """Elements of the lists in an object, and its values that are no lists."""
    depth, builder, level = 0, None, 0
    for event, value in ijson.basic_parse(stream, use_float=True):
        if builder is None and _starts_element(event, depth):
            builder, level = ObjectBuilder(), depth
        if builder is not None:
            builder.event(event, value)
        depth += event.startswith("start_") - event.startswith("end_")
        if builder is not None and depth == level:
            yield builder.value
            builder = None


def _starts_element(event: str, depth: int) -> bool:
    if depth == 0 or event == "map_key" or event.startswith("end_"):
        return False
    return depth == 2 or event != "start_array"


# -------------------------------------------------------------------------------------------------------- tables


def _csv_rows(part: Part, delimiter: str) -> Iterator[Row]:
    with open_text(part, newline="") as stream:
        yield from _table(part.place, _csv_cells(stream, delimiter), delimiter)


def _csv_cells(stream: TextIO, delimiter: str) -> Iterator[tuple[int, Cells | None]]:
    """Cells of each row and the line on which it starts; None for a row that does not end."""
    reader = csv.reader(stream, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield line, None


def _table(place: str, numbered: Iterable[tuple[int, Cells | None]], delimiter: str) -> Iterator[Row]:
    header: Cells | None = None
    for number, cells in numbered:
        if cells is None:
            yield Row(f"{place}:{number}", None, "", "a quotation mark is not closed")
        elif not any(cell.strip() for cell in cells):
            continue
        elif header is None:
            header = _without_blank_end([name.strip() for name in cells])
        else:
            fault = _spill(header, cells)
            value = None if fault else dict(zip(header, cells, strict=False))
            yield Row(f"{place}:{number}", value, delimiter.join(cells), fault)


def _spill(header: Cells, cells: Cells) -> str | None:
    if len(_without_blank_end(cells)) > len(header):
        return "more cells than columns"
    return "fewer cells than columns" if len(cells) < len(header) else None


def _without_blank_end(cells: Cells) -> Cells:
    width = max((index for index, cell in enumerate(cells, 1) if cell.strip()), default=0)
    return cells[:width]


def _xlsx_rows(part: Part) -> Iterator[Row]:
    # Here, because it takes long to import and few files need it.
    import openpyxl

    with part.open_bytes() as stream:
        content = io.BytesIO(stream.read())
    try:
        book = openpyxl.load_workbook(content, read_only=True, data_only=True)
    except Exception as error:  # openpyxl lets whatever it meets through
        raise UserError(f"{part.place}: no readable .xlsx ({error}); save it again, or as .csv") from None
    for sheet in book.worksheets:
        place = part.place if len(book.worksheets) == 1 else f"{part.place}!{sheet.title}"
        # Some programs write a wrong size into the file.
        sheet.reset_dimensions()
        yield from _table(place, _sheet_cells(sheet), "\t")


def _sheet_cells(sheet: Any) -> Iterator[tuple[int, Cells]]:
    width = 0
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        width = max(width, len(values))
        # Blank cells at the end may be left out.
        yield number, [_cell_text(value) for value in values] + [""] * (width - len(values))


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def parquet_rows(part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, {column: value}), read by record batches; nulls are left out. UserError: the file is broken."""
    # Here, because it takes long to import.
    import pyarrow
    import pyarrow.parquet

    with part.open_bytes() as stream:
        try:
            batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024)
            rows = (row for batch in batches for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield index, {name: value for name, value in row.items() if value is not None}
        except (pyarrow.ArrowException, OSError) as error:
            message = str(error).splitlines()[0]
            raise UserError(f"{part.place}: no readable .parquet ({message}); write or download it again") from None
