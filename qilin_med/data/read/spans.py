"""Where a large file may be cut, so that each span of it is read by itself and gives the rows that it gives in the whole.

Every row keeps its place: a span knows how many lines, elements or rows lie before it.
"""

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import DataSource, Kind, RawFiles
from qilin_med.data.read.files import COMPRESSIONS, Part, Span, open_parts, read_head, read_line
from qilin_med.data.read.formats.reading import Reader
from qilin_med.data.read.readers import READERS, as_raw
from qilin_med.data.read.tables import Elements, csv_cells, holds_lines, parse_json

READ_BYTES = 1 << 20
Border = tuple[int, int]
"""A byte at which a row begins, and how many lines, elements or rows lie before."""


def line_test(file: Path, reader: Reader, source: RawFiles) -> Callable[[str], Any] | None:
    """Tells whether a record may begin with a line. None if the file can only be read from its start: it is packed, only
    so many of its records are wanted, or what a record is depends on those before."""
    suffix = file.suffix.lower()
    if suffix in (*COMPRESSIONS, ".zip", ".xlsx") or getattr(source, "limit", None):
        return None
    if "*" in source.rows or (source.header and suffix == ".txt"):
        return None
    return reader.begins(suffix, source)


def cut_file(file: Path, reader: Reader, source: RawFiles, number: int) -> list[Span]:
    """So many spans, of about equal size, that make up a file for which there is a `line_test`. Some are empty where rows
    are long; where nobody knows how to cut, all but one are."""
    [part] = open_parts(file, reader.suffixes)
    size, head = file.stat().st_size, (0, 0)
    encoding, text, is_whole = read_head(part)
    targets = [size * k // number for k in range(1, number)]
    if part.suffix == ".parquet":
        size, borders = _row_groups(part, number)
    elif encoding not in ("utf-8-sig", "gb18030"):
        borders = iter(())
    elif part.suffix in (".csv", ".tsv"):
        borders = _between_rows_of_cells(part, targets)
    elif part.suffix in (".txt", ".jsonl") or holds_lines(text.lstrip(), is_whole, keyed=False):
        borders = _between_lines(part, encoding, targets, line_test(file, reader, source))
    else:
        # In GB18030, a bracket may be half a character.
        is_array = text.lstrip().startswith("[") and encoding == "utf-8-sig"
        borders = _between_elements(part, targets) if is_array else iter(())
    found = [head, *borders]
    found += [(size, 0)] * (number + 1 - len(found))
    return [Span(start, end, first, end == size) for (start, first), (end, _) in pairwise(found)]


def cut_training_file(kind: Kind, file: Path, source: DataSource, number: int) -> list[Span]:
    """As `cut_file`, without the empty spans; none if the file can only be read from its start."""
    reader, raw = READERS[kind], as_raw(kind, file, source)
    if line_test(file, reader, raw) is None:
        return []
    return [span for span in cut_file(file, reader, raw, number) if span.start < span.end]


def _between_lines(part: Part, encoding: str, targets: list[int], begins: Callable[[str], Any]) -> Iterator[Border]:
    """The first line from each target on that passes the test."""
    at = number = 0
    with part.open_bytes() as stream:
        for target in targets:
            while at < target and (block := stream.read(min(READ_BYTES, target - at))):
                at, number = at + len(block), number + block.count(b"\n")
                if at == target and not block.endswith(b"\n"):
                    at, number = at + read_line(stream)[1], number + 1
            while (line := read_line(stream))[1] and not begins(line[0].decode(encoding, "replace").rstrip("\r\n")):
                at, number = at + line[1], number + 1
            stream.seek(at)
            yield at, number


def _between_rows_of_cells(part: Part, targets: list[int]) -> Iterator[Border]:
    """The first row from each target on, below the names of the columns: quotation marks may hold line breaks, so the
    rows before are parsed. No further ones where a line break is none of these."""
    at, line, is_named = 0, 0, False
    left = iter(targets)
    target = next(left, None)
    with part.open_bytes() as stream:
        for number, cells, fault in csv_cells(part, "\t" if part.suffix == ".tsv" else ","):
            for _ in range(line, number - 1):
                start, length = read_line(stream)
                if b"\r" in start.removesuffix(b"\r\n"):
                    return
                at += length
            line = number - 1
            while is_named and target is not None and at >= target:
                yield at, line
                target = next(left, None)
            if target is None:
                return
            is_named = is_named or (not fault and any(map(str.strip, cells)))


def _between_elements(part: Part, targets: list[int]) -> Iterator[Border]:
    """The first element of an array from each target on."""
    left = iter(targets)
    target = next(left, None)
    # As Latin-1, each byte is a character.
    with io.TextIOWrapper(part.open_bytes(), encoding="latin-1", newline="\n") as stream:
        found = (element for element in Elements(stream) if element[2] is not None)
        for index, (start, text, ended) in enumerate(found):
            if not ended or parse_json(text.encode("latin-1"))[1]:
                return  # where a reader resumes is not known here
            while target is not None and start >= target:
                yield start, index
                target = next(left, None)
            if target is None:
                return


def _row_groups(part: Part, number: int) -> tuple[int, Iterator[Border]]:
    """(row groups of a .parquet, borders between them)."""
    import pyarrow.parquet  # here, because it takes long to import

    with part.open_bytes() as stream:
        try:
            about = pyarrow.parquet.ParquetFile(stream).metadata
        except (pyarrow.ArrowException, OSError):  # whoever reads it will say so
            return 1, iter(())
        rows = [about.row_group(index).num_rows for index in range(about.num_row_groups)]
    places = [len(rows) * k // number for k in range(1, number)]
    return len(rows), ((place, sum(rows[:place])) for place in places)
