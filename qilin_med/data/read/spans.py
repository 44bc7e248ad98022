"""Where a large file may be cut, so that each span of it is read by itself and gives the rows that it gives in the whole.

Every row keeps its place: a span knows how many lines, elements or rows lie before it.
"""

import csv
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import DataSource, Kind, RawFiles
from qilin_med.data.read.files import COMPRESSIONS, Part, Span, open_parts, read_head
from qilin_med.data.read.formats.reading import Reader
from qilin_med.data.read.readers import READERS, as_raw
from qilin_med.data.read.tables import holds_lines, split_json

READ_BYTES = 1 << 20
Border = tuple[int, int]
"""A byte at which a row begins, and how many lines, elements or rows lie before."""


def line_test(file: Path, reader: Reader, source: RawFiles) -> Callable[[str], Any] | None:
    """Tells whether a record may begin with a line. None if the file can only be read from its start: it is packed, only
    so many of its records are wanted, or what a record is depends on those before."""
    suffix = file.suffix.lower()
    if suffix in (*COMPRESSIONS, ".zip", ".xlsx") or getattr(source, "limit", None):
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
        borders = _between_rows_of_cells(part, encoding, targets)
    elif part.suffix in (".txt", ".jsonl") or holds_lines(text.lstrip(), is_whole, nested=False):
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
                    at, number = at + len(stream.readline()), number + 1
            while (line := stream.readline()) and not begins(line.decode(encoding, "replace").rstrip("\r\n")):
                at, number = at + len(line), number + 1
            stream.seek(at)
            yield at, number


def _between_rows_of_cells(part: Part, encoding: str, targets: list[int]) -> Iterator[Border]:
    """The first row from each target on, below the names of the columns: quotation marks may hold line breaks, so the
    rows before are parsed. No further ones where a line break is none of these."""
    at, is_named = 0, False
    with part.open_bytes() as stream:

        def lines() -> Iterator[str]:
            nonlocal at
            for line in stream:
                if b"\r" in line.removesuffix(b"\r\n"):
                    raise csv.Error
                at += len(line)
                yield line.decode(encoding, "replace")

        rows = csv.reader(lines(), delimiter="\t" if part.suffix == ".tsv" else ",")
        left = iter(targets)
        target = next(left, None)
        try:
            for cells in rows:
                is_named = is_named or any(map(str.strip, cells))
                while is_named and target is not None and at >= target:
                    yield at, rows.line_num
                    target = next(left, None)
                if target is None:
                    return
        except csv.Error:  # also for a quotation mark that is not closed
            return


def _between_elements(part: Part, targets: list[int]) -> Iterator[Border]:
    """The first element of an array from each target on."""
    left = iter(targets)
    target = next(left, None)
    # As Latin-1, each byte is a character.
    with io.TextIOWrapper(part.open_bytes(), encoding="latin-1", newline="\n") as stream:
        for index, (start, _) in enumerate(split_json(stream)):
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
