"""Rows of text lines, JSON lines, JSON arrays and objects, .csv, .tsv, .xlsx and .parquet, streamed."""

import csv
import io
import json
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, starmap
from typing import Any, TextIO

import orjson

from qilin_med.data.read.expressions import expanded
from qilin_med.data.read.files import (
    LONGEST,
    TOO_LONG,
    Line,
    Part,
    bounded_lines,
    check_expansion,
    open_text,
    read_head,
    read_lines,
)
from qilin_med.data.read.raw import RawRow
from qilin_med.errors import UserError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
READ_CHARACTERS = 1 << 20
DOUBTED = 1 << 13  # characters from which an element of a JSON array may be one that lacks its end
# A quoted cell that is longer, in characters or lines, comes from a quotation mark that is never closed.
CELL_CHARACTERS, CELL_LINES = 1 << 22, 1000
csv.field_size_limit(CELL_CHARACTERS)
# As many as a sheet can have. A wrong number would stand for as many blank rows.
SHEET_ROWS = 1 << 20
# What ends an element of a JSON array. A string is taken whole, for the signs in it say nothing; `cut` if it goes on.
STRING_END = r'[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|(?P<cut>\\?\Z))'
JSON_SIGN = re.compile(rf'"{STRING_END}|[\[\]{{}},]', re.DOTALL)
JSON_STRING_END = re.compile(STRING_END, re.DOTALL)
# The same in one step, where the sign lies in what has been read.
JSON_NEXT_SIGN = re.compile(r'(?:[^"\[\]{},]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{},])', re.DOTALL)
# Where an element may begin after one that is broken.
JSON_BOUNDARY = re.compile(r",\s*(?=[{\[])")
JSON_DECODER = json.JSONDecoder()

Cells = list[str]
Numbered = tuple[int, Cells, str | None]
"""The number of a row's first line, its cells, and the fault of one that is no row."""


def read_rows(part: Part, rows: str = "", header: Sequence[str] = ()) -> Iterator[RawRow]:
    """All rows of a part, in order. Blank lines and rows of blank cells are no rows.

    `rows` lists the records of each (see `qilin_med.data.read.expressions.expanded`). A JSON object is one row, unless `rows`
    begins with "*", which goes through its values one by one. `header` names the columns of a table without a header line; a
    .txt with one is read as .tsv. UserError: a .json that is neither lines nor a whole value; a broken .xlsx or .parquet.
    """
    keyed = re.search(r"(^|\|\| *)\*", rows) is not None
    found = _rows_of(part, keyed, list(header))
    yield from chain.from_iterable(expanded(row, rows) for row in found) if rows else found


def _rows_of(part: Part, keyed: bool, header: Cells) -> Iterator[RawRow]:
    delimiter = "," if part.suffix == ".csv" else "\t"
    match part.suffix:
        case ".csv" | ".tsv":
            first = _first_cells(part, delimiter) if part.first else []
            cells = csv_cells(part, delimiter, len(first))
            yield from _table(part.place, cells, delimiter, header or _names_in(first))
        case ".txt" if header:
            yield from _table(part.place, csv_cells(part, delimiter), delimiter, header)
        case ".xlsx":
            yield from _xlsx_rows(part, header)
        case ".parquet":
            yield from _parquet_rows(part)
        case ".txt":
            for number, line, fault in read_lines(part):
                yield RawRow(f"{part.place}:{number}", {"text": line}, line, fault)
        case _:
            yield from _json_rows(part, keyed)


# ---------------------------------------------------------------------------------------------------------- JSON


def _json_rows(part: Part, keyed: bool) -> Iterator[RawRow]:
    _, head, whole = read_head(part)
    head = head.lstrip()
    if part.suffix != ".jsonl" and not holds_lines(head, whole, keyed):
        yield from _json_elements(part, head[:1], keyed and head.startswith("{"))
        return
    for number, line, fault in read_lines(part):
        value, fault = (None, fault) if fault else parse_json(line)
        yield RawRow(f"{part.place}:{number}", value, line, fault)


def holds_lines(head: str, whole: bool, keyed: bool) -> bool:
    """Whether a .json file holds JSON lines, as many published ones do: a first line that is whole, or, where the
    file is no single value, a later line that is an object (then the first line is broken)."""
    first, *rest = head.split("\n")
    if first.startswith("["):
        return _is_json(first, list) and rest != [] and rest[0].lstrip().startswith("[")
    if _is_json(first, dict):
        return not (keyed and not any(rest))
    if keyed or (whole and _is_json(head, dict)):
        return False
    # The first line may be a whole book.
    return (not rest and first.startswith("{")) or any(line[:1] == "{" and _is_json(line, dict) for line in rest)


def _is_json(text: str, kind: type) -> bool:
    return isinstance(parse_json(text)[0], kind)


def parse_json(text: str | bytes) -> tuple[Any, str | None]:
    """(value, fault)."""
    try:
        return orjson.loads(text), None
    except orjson.JSONDecodeError:
        pass
    # orjson refuses half surrogate pairs, NaN and long numbers, which one of a row's other fields may hold.
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"broken JSON: {error.msg}"
    except (ValueError, RecursionError):
        return None, "broken JSON: a number or nesting beyond all bounds"


def _json_elements(part: Part, opening: str, keyed: bool) -> Iterator[RawRow]:
    """Elements of an array, each parsed by itself, or one value. `keyed`: an object, whose entries come as {key: value}.

    A broken element is faulty alone: reading resumes where something begins that has the fields of those before. UserError:
    the file ends before its array does, or goes on behind it.
    """
    shapes: set[Any] = set()
    index = part.first
    with open_text(part) as stream:
        if keyed or opening == "[":
            elements = Elements(stream, bool(part.span and part.span.start), not part.span or part.span.is_last)
        else:
            elements = [(0, stream.read(LONGEST), not stream.read(1))]
        for start, text, ended in elements:
            goes_on = ended is None
            begin = start + len(text) - len(text.lstrip())
            if goes_on and (opening != "[" or not (elements.never_ends(begin) or _is_broken(text))):
                continue
            text = f"{{{text}}}" if keyed and text.strip() else text
            value, fault = (None, f"an element {TOO_LONG}") if len(text) >= LONGEST else parse_json(text)
            if ended and not fault:
                shapes |= {_shape(value)} if len(shapes) < 1000 else set()
            elif opening == "[" and (resumed := _next_element(elements, start, text, shapes, goes_on)):
                elements.resume_at(start + resumed)
                text, value, fault = text[:resumed], None, fault or "broken JSON: Extra data"
            elif goes_on:
                continue
            elif len(text) < LONGEST and (opening != "[" or not ended) and (error := _end_error(text, opening)):
                if part.span:  # only the whole file tells the line
                    deque(_json_elements(replace(part, span=None), opening, keyed), maxlen=0)
                line, column = _line_and_column(part, start + error.pos - keyed)
                raise UserError(
                    f"{part.place}: line {line}, column {column}: not valid JSON after {index} whole rows ({error.msg});"
                    " expected one array of objects, one object, or an object a line"
                ) from None
            yield RawRow(f"{part.place}#{index}", value, text if fault else None, fault)
            index += 1


def _shape(value: Any) -> Any:
    return frozenset(value) if isinstance(value, dict) else type(value)


def _next_element(elements: "Elements", start: int, text: str, shapes: set[Any], goes_on: bool) -> int:
    """Where in a broken text an element begins that is whole and shaped like those seen before; 0: nowhere, or not known
    from a text that goes on."""
    for boundary in islice(JSON_BOUNDARY.finditer(text), 10_000):
        try:
            value, _ = JSON_DECODER.raw_decode(text, boundary.end())
        except (ValueError, RecursionError) as error:
            if goes_on and _is_cut(error, text) and not elements.never_ends(start + boundary.end()):
                return 0
            continue
        if not shapes or _shape(value) in shapes:
            return boundary.end()
    return 0


def _is_broken(text: str) -> bool:
    """Whether no continuation makes JSON of it."""
    try:
        json.loads(text)
        return False
    except (ValueError, RecursionError) as error:
        return isinstance(error, json.JSONDecodeError) and not _is_cut(error, text)


def _is_cut(error: Exception, text: str) -> bool:
    is_syntax = isinstance(error, json.JSONDecodeError)
    return is_syntax and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"))


def _end_error(text: str, opening: str) -> json.JSONDecodeError | None:
    """What is wrong with the end of a file; None where an element is broken before, and the array ends behind it."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error if _is_cut(error, text) or opening != "[" or not text.rstrip().endswith("]") else None
    except (ValueError, RecursionError):
        return None
    return json.JSONDecodeError("Extra data, or an end that is missing", text, len(text))


class Elements:
    """(offset, text, whether it has ended) of what the commas of a JSON array or object divide. What has not ended is too
    long, or all that is left where the file ends early or goes on behind the array.

    A long element, or what lies behind the array, comes several times, each time twice as much of it, with None: whoever
    finds it broken resumes early, so that damage takes time for what it damages, not for all that follows."""

    def __init__(self, stream: TextIO, inside: bool = False, ends: bool = True):
        """`inside`: the stream begins after a comma; unless it `ends`, it stops at one."""
        self._stream, self._at_end, self._ends = stream, False, ends
        self._text, self._offset = "", 0  # what is in memory, and where in the file it begins
        self._start = self._scanned = 0
        self._open, self._doubted = [0] * inside, DOUBTED  # where the brackets stand that are open
        self._unclosed: set[int] = set()
        self._in_string = self._resumed = False

    def resume_at(self, offset: int) -> None:
        """An element begins there, within the text that came last."""
        self._start = self._scanned = offset - self._offset
        self._open, self._in_string, self._resumed = [0], False, True
        self._doubted = DOUBTED

    def never_ends(self, offset: int) -> bool:
        """Whether an earlier scan has shown that a bracket is never closed, or not for so long that another does not pay."""
        return offset in self._unclosed

    def __iter__(self) -> Iterator[tuple[int, str, bool | None]]:
        count, is_lost = len(self._open), False  # lost: the rest of an element that is too long
        while True:
            self._start = self._scanned if is_lost else self._start
            sign = self._next_sign()
            if sign in ("[", "{"):
                self._open.append(self._offset + self._scanned - 1)
                self._start = self._scanned if len(self._open) == 1 else self._start
                continue
            if sign and len(self._open) > 1:
                if sign != ",":
                    self._open.pop()
                if not is_lost and self._scanned - self._start >= self._doubted:
                    self._doubted *= 2
                    yield self._offset + self._start, self._text[self._start : self._scanned], None
                    self._resumed = False
                continue
            text = self._text[self._start : self._scanned - len(sign)]
            if not sign and self._at_end and not self._ends and not text.strip():
                return
            if not sign:
                reached = self._offset + self._scanned - LONGEST // 2
                self._unclosed = {place for place in self._open if self._at_end or place <= reached}
            # Between brackets there may be nothing at all.
            if not is_lost and (sign in ("", ",") or count or text.strip()):
                yield self._offset + self._start, text, sign != ""
                count += 1
            if self._resumed:
                self._resumed = is_lost = False
                continue
            if not sign and self._at_end:
                return
            is_lost = not sign
            self._start, self._doubted = self._scanned, DOUBTED
            if sign in ("]", "}"):
                yield from self._behind()
                if not self._resumed:
                    return
                self._resumed = False

    def _behind(self) -> Iterator[tuple[int, str, bool | None]]:
        is_all = False
        while not (is_all or self._resumed):
            while len(self._text) - self._start < self._doubted and self._read_on(READ_CHARACTERS):
                pass
            text = self._text[self._start : self._start + self._doubted]
            is_all = len(text) < self._doubted or len(text) >= LONGEST
            if text.strip():
                yield self._offset + self._start, text, False if is_all else None
            self._doubted *= 2

    def _next_sign(self) -> str:
        """The next bracket or comma outside strings, up to which is then scanned; "" at the end of the file or where an
        element is too long."""
        if not self._in_string and (found := JSON_NEXT_SIGN.match(self._text, self._scanned)):
            self._scanned = found.end()
            return found[1]
        while True:
            inside = self._in_string
            found = (JSON_STRING_END.match if inside else JSON_SIGN.search)(self._text, self._scanned)
            self._in_string = found is not None and found["cut"] is not None
            self._scanned = found.end() - len(found["cut"] or "") if found else len(self._text)
            if found and not self._in_string:
                if not inside and found[0][0] != '"':
                    return found[0]
            elif len(self._text) - self._start >= LONGEST or not self._read_on(READ_CHARACTERS):
                return ""

    def _read_on(self, characters: int) -> bool:
        chunk = self._stream.read(characters)
        self._text, self._offset = self._text[self._start :] + chunk, self._offset + self._start
        self._scanned, self._start, self._at_end = self._scanned - self._start, 0, not chunk
        return bool(chunk)


def _line_and_column(part: Part, offset: int) -> tuple[int, int]:
    number, line = 0, ""
    with open_text(part) as stream:
        for number, line in enumerate(stream, 1):  # noqa: B007
            if offset < len(line):
                break
            offset -= len(line)
    return number, offset + 1


# -------------------------------------------------------------------------------------------------------- tables


def csv_cells(part: Part, delimiter: str, width: int = 0) -> Iterator[Numbered]:
    """Where a quotation mark is not closed, its line is faulty and reading resumes at the next one."""
    with open_text(part, newline="") as stream:
        lines, waiting = starmap(Line, bounded_lines(stream, part.first)), deque[Line]()

        def following() -> Line | None:
            return waiting.popleft() if waiting else next(lines, None)

        while line := following():
            taken = [line]
            cells, fault = line.text.rstrip("\r\n").split(delimiter), line.fault
            if not fault and '"' in line.text:
                cells, fault = _quoted_cells(taken, following, delimiter, width)
            if fault:
                waiting.extendleft(reversed(taken[1:]))
            yield line.number, cells, fault
            width = width or (len(cells) if not fault and any(map(str.strip, cells)) else 0)


def _first_cells(part: Part, delimiter: str) -> Cells:
    """The cells with which a file begins, mostly the names of the columns; a span has them not."""
    whole = csv_cells(replace(part, span=None), delimiter)
    return next(cells for _, cells, fault in whole if not fault and any(map(str.strip, cells)))


def _names_in(cells: Cells) -> Cells:
    width = max((index for index, cell in enumerate(cells, 1) if cell.strip()), default=0)
    return [name.strip() for name in cells[:width]]


def _quoted_cells(
    taken: list[Line], following: Callable[[], Line | None], delimiter: str, width: int
) -> tuple[Cells, str | None]:
    """(cells, fault) of the row that begins with the line in `taken`, to which its further lines are added."""

    def texts() -> Iterator[str]:
        yield taken[0].text
        length = 0
        while len(taken) < CELL_LINES and length < CELL_CHARACTERS and (line := following()):
            taken.append(line)
            length += len(line.text)
            yield line.text

    try:
        cells = next(csv.reader(texts(), delimiter=delimiter, strict=True))
        # A mark that is not closed may end at the next row's; then the cells do not add up.
        if len(taken) == 1 or len(cells) == (width or len(cells)):
            return cells, None
    except csv.Error:
        # A line may have marks that enclose no cell, which is told from one that is not closed by what follows it.
        rows = (
            list(csv.reader([taken[0].text, "\n"], delimiter=delimiter)) if len(taken[0].text) < CELL_CHARACTERS else []
        )
        if len(rows) == 2:
            return rows[0], None
    return [taken[0].text.rstrip("\r\n")], "a quotation mark is not closed"


def _table(place: str, numbered: Iterable[Numbered], delimiter: str, header: Cells) -> Iterator[RawRow]:
    """Rows of cells as {column: text}; unless there is a header, the first that is not blank names the columns."""
    for number, cells, fault in numbered:
        id_, text = f"{place}:{number}", delimiter.join(cells)
        width = max((index for index, cell in enumerate(cells, 1) if cell.strip()), default=0)
        if not fault and width > len(header) > 0:
            fault = "more cells than columns"
        elif not fault and width > 0 and len(cells) < len(header):
            fault = "fewer cells than columns"
        if fault:
            yield RawRow(id_, None, text, fault)
        elif width and not header:
            header = _names_in(cells)
        elif width:
            yield RawRow(id_, dict(zip(header, cells, strict=False)), text)


def _xlsx_rows(part: Part, header: Cells) -> Iterator[RawRow]:
    import openpyxl  # here, because it takes long to import and few files need it

    with part.open_bytes() as stream:
        content = io.BytesIO(stream.read())
    try:
        with zipfile.ZipFile(content) as archive:
            check_expansion(part.place, archive, content.getbuffer().nbytes, part.max_expansion)
        book = openpyxl.load_workbook(content, read_only=True, data_only=True)
        for sheet in book.worksheets:
            # Some programs write a wrong size into the file.
            sheet.reset_dimensions()
            place = part.place if len(book.worksheets) == 1 else f"{part.place}!{sheet.title}"
            yield from _table(place, _sheet_cells(sheet), "\t", header)
    except UserError:
        raise
    except Exception as error:  # openpyxl lets whatever it meets through
        raise UserError(f"{part.place}: no readable .xlsx ({error}); save it again, or as .csv") from None


def _sheet_cells(sheet: Any) -> Iterator[Numbered]:
    width = 0
    for number, values in enumerate(sheet.iter_rows(max_row=SHEET_ROWS + 1, values_only=True), 1):
        if number > SHEET_ROWS:
            raise ValueError(f"a row beyond the last one that a sheet can have, {SHEET_ROWS:,}")
        # Whole numbers come as 3.0, and blank cells at the end may be left out.
        values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
        cells = ["" if value is None else str(value) for value in values]
        width = max(width, len(cells))
        yield number, cells + [""] * (width - len(cells)), None


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
