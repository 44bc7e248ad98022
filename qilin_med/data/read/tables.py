"""Rows of text lines, JSON lines, JSON arrays and objects, .csv, .tsv, .xlsx and .parquet, streamed."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TextIO

import orjson

from qilin_med.data.read.files import Part, open_text, read_head, read_lines
from qilin_med.errors import UserError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
# A cell that long comes from a quotation mark that is never closed.
csv.field_size_limit(1 << 22)
READ_CHARACTERS = 1 << 20
# What ends an element of a JSON array. A string is taken whole, for the signs in it say nothing; `cut` if it goes on.
JSON_SIGN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|(?P<cut>\\?\Z))|[\[\]{},]', re.DOTALL)

Cells = list[str]


class RawRow(NamedTuple):
    """A row as it stands in the file."""

    id: str
    """Its place: "place:line" of lines and tables, "place#index" of arrays and .parquet."""
    value: Any
    """JSON: any value; tables: {column: text}; a line of a .txt: {"text": line}."""
    text: str | None = None
    """The original line, where the row is one."""
    fault: str | None = None
    """Why the row could not be parsed."""


def read_rows(part: Part, nested: bool = False) -> Iterator[RawRow]:
    """All rows of a part, in order. Blank lines and rows of blank cells are no rows.

    A JSON object is one row; with `nested` its values are rows, and of values that are lists the elements.
    UserError: a .json that is neither lines nor a whole value; a broken .xlsx or .parquet.
    """
    delimiter = "\t" if part.suffix == ".tsv" else ","
    match part.suffix:
        case ".csv" | ".tsv":
            header = _csv_header(part, delimiter) if part.first else []
            yield from _table(part.place, _csv_cells(part, delimiter), delimiter, header)
        case ".xlsx":
            yield from _xlsx_rows(part)
        case ".parquet":
            yield from _parquet_rows(part)
        case ".txt":
            for number, line in read_lines(part):
                yield RawRow(f"{part.place}:{number}", {"text": line}, line)
        case _:
            yield from _json_rows(part, nested)


# ---------------------------------------------------------------------------------------------------------- JSON


def _json_rows(part: Part, nested: bool) -> Iterator[RawRow]:
    _, head, whole = read_head(part)
    head = head.lstrip()
    if part.suffix != ".jsonl" and not holds_lines(head, whole, nested):
        yield from _json_elements(part, head, keyed=nested and head.startswith("{"))
        return
    for number, line in read_lines(part):
        try:
            value, fault = _parse(line)
        except json.JSONDecodeError as error:
            value, fault = None, f"broken JSON: {error.msg}"
        yield RawRow(f"{part.place}:{number}", value, line, fault)


def holds_lines(head: str, whole: bool, nested: bool) -> bool:
    """Whether a .json file holds JSON lines, as many published ones do: a first line that is whole, or, where the
    file is no single value, a later line that is an object (then the first line is broken)."""
    first, *rest = head.split("\n")
    if first.startswith("["):
        return _is_json(first, list) and rest != [] and rest[0].lstrip().startswith("[")
    if _is_json(first, dict):
        return not (nested and any(isinstance(value, list) for value in json.loads(first).values()))
    if nested or (whole and _is_json(head, dict)):
        return False
    # The first line may be a whole book.
    return (not rest and first.startswith("{")) or any(line[:1] == "{" and _is_json(line, dict) for line in rest)


def _is_json(text: str, kind: type) -> bool:
    try:
        return isinstance(_parse(text)[0], kind)
    except json.JSONDecodeError:
        return False


def _parse(text: str) -> tuple[Any, str | None]:
    """(value, fault). Raises JSONDecodeError where the text is no JSON."""
    try:
        return orjson.loads(text), None
    except orjson.JSONDecodeError:
        pass
    # orjson refuses half surrogate pairs, NaN and long numbers, which one of a row's other fields may hold.
    try:
        return json.loads(text), None
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        return None, "broken JSON: a number or nesting beyond all bounds"


def _json_elements(part: Part, head: str, keyed: bool) -> Iterator[RawRow]:
    """Elements of an array, each parsed by itself, or one value. `keyed`: those of an object's values."""
    index, inside, ends = part.first, bool(part.span and part.span.start), not part.span or part.span.is_last
    with open_text(part) as stream:
        is_split = keyed or head.startswith("[")
        pieces = split_json(stream, inside, ends) if is_split else [(0, stream.read())]
        for start, text in pieces:
            try:
                value, fault = _parse(f"{{{text}}}" if keyed and text.strip() else text)
            except json.JSONDecodeError as error:
                if part.span:  # only the whole file tells the line
                    deque(_json_elements(replace(part, span=None), head, keyed), maxlen=0)
                line, column = _line_and_column(part, start + error.pos - keyed)
                raise UserError(
                    f"{part.place}: line {line}, column {column}: not valid JSON after {index} whole rows ({error.msg});"
                    " expected one array of objects, one object, or an object a line"
                ) from None
            if keyed and not fault:
                [value] = value.values()
            for element in value if keyed and isinstance(value, list) else [value]:
                yield RawRow(f"{part.place}#{index}", element, text if fault else None, fault)
                index += 1


def split_json(stream: TextIO, inside: bool = False, ends: bool = True) -> Iterator[tuple[int, str]]:
    """(offset, text) of what the commas of a JSON array or object divide. Last comes text that is no JSON if the value
    does not end, or goes on. `inside`: the stream begins after a comma; unless it `ends`, it stops at one."""
    text, offset, start, scanned, depth, pieces = "", 0, 0, 0, int(inside), int(inside)
    while chunk := stream.read(READ_CHARACTERS):
        text, offset, scanned, start = text[start:] + chunk, offset + start, scanned - start, 0
        for sign in JSON_SIGN.finditer(text, scanned):
            scanned = sign.end() if sign["cut"] is None else sign.start()
            if sign[0] in ("[", "{"):
                depth += 1
                start = scanned if depth == 1 else start
            elif sign[0] in ("]", "}", ","):
                piece = text[start : sign.start()]
                # Between brackets there may be nothing at all.
                if depth == 1 and (sign[0] == "," or pieces or piece.strip()):
                    yield offset + start, piece
                    pieces += 1
                start = scanned if depth == 1 else start
                depth -= sign[0] != ","
            if depth == 0:
                if (rest := text[scanned:] + stream.read()).strip():
                    yield offset + scanned - 1, f"0{rest}"
                return
    if text[start:].strip():
        yield offset + start, text[start:]
    if ends:
        yield offset + len(text), ""


def _line_and_column(part: Part, offset: int) -> tuple[int, int]:
    number, line = 0, ""
    with open_text(part) as stream:
        for number, line in enumerate(stream, 1):  # noqa: B007
            if offset < len(line):
                break
            offset -= len(line)
    return number, offset + 1


# -------------------------------------------------------------------------------------------------------- tables


def _csv_cells(part: Part, delimiter: str) -> Iterator[tuple[int, Cells | None]]:
    """Cells of each row and the line on which it starts; None for a row that does not end."""
    with open_text(part, newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        while True:
            line = part.first + reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield line, None


def _csv_header(part: Part, delimiter: str) -> Cells:
    """The names of the columns, which only the beginning of a file has."""
    whole = _csv_cells(replace(part, span=None), delimiter)
    return next(_names_in(cells) for _, cells in whole if cells and any(map(str.strip, cells)))


def _names_in(cells: Cells) -> Cells:
    width = max((index for index, cell in enumerate(cells, 1) if cell.strip()), default=0)
    return [name.strip() for name in cells[:width]]


def _table(place: str, numbered: Iterable[tuple[int, Cells | None]], delimiter: str, header: Cells) -> Iterator[RawRow]:
    """Rows of cells as {column: text}; unless there is a header already, the first that is not blank is one."""
    for number, cells in numbered:
        id_ = f"{place}:{number}"
        if cells is None:
            yield RawRow(id_, None, "", "a quotation mark is not closed")
            continue
        width = max((index for index, cell in enumerate(cells, 1) if cell.strip()), default=0)
        if width and not header:
            header = _names_in(cells)
        elif width > len(header):
            yield RawRow(id_, None, delimiter.join(cells), "more cells than columns")
        elif width and len(cells) < len(header):
            yield RawRow(id_, None, delimiter.join(cells), "fewer cells than columns")
        elif width:
            yield RawRow(id_, dict(zip(header, cells, strict=False)), delimiter.join(cells))


def _xlsx_rows(part: Part) -> Iterator[RawRow]:
    import openpyxl  # here, because it takes long to import and few files need it

    with part.open_bytes() as stream:
        content = io.BytesIO(stream.read())
    try:
        book = openpyxl.load_workbook(content, read_only=True, data_only=True)
        for sheet in book.worksheets:
            # Some programs write a wrong size into the file.
            sheet.reset_dimensions()
            place = part.place if len(book.worksheets) == 1 else f"{part.place}!{sheet.title}"
            yield from _table(place, _sheet_cells(sheet), "\t", [])
    except Exception as error:  # openpyxl lets whatever it meets through
        raise UserError(f"{part.place}: no readable .xlsx ({error}); save it again, or as .csv") from None


def _sheet_cells(sheet: Any) -> Iterator[tuple[int, Cells]]:
    width = 0
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        # Whole numbers come as 3.0, and blank cells at the end may be left out.
        values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
        cells = ["" if value is None else str(value) for value in values]
        width = max(width, len(cells))
        yield number, cells + [""] * (width - len(cells))


def _parquet_rows(part: Part) -> Iterator[RawRow]:
    """Read by record batches; nulls are left out."""
    import pyarrow.parquet  # here, because it takes long to import

    with part.open_bytes() as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            groups = range(part.span.start, part.span.end) if part.span else range(file.num_row_groups)
            batches = file.iter_batches(batch_size=1024, row_groups=list(groups))
            for index, row in enumerate((row for batch in batches for row in batch.to_pylist()), part.first):
                yield RawRow(f"{part.place}#{index}", {name: value for name, value in row.items() if value is not None})
        except (pyarrow.ArrowException, OSError) as error:
            message = str(error).splitlines()[0]
            raise UserError(f"{part.place}: no readable .parquet ({message}); write or download it again") from None
