"""Running text: books, web pages, guidelines."""

from collections.abc import Iterator
from typing import Any

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, read_lines
from qilin_med.data.read.formats.reading import Counted, Reader, row_reader
from qilin_med.data.read.records import document_text
from qilin_med.data.read.tables import ROW_SUFFIXES
from qilin_med.records import Document


def _read(part: Part, source: RawFiles) -> Iterator[Counted]:
    if part.suffix == ".txt":
        return _read_lines(part, getattr(source, "join_lines", 0))
    return _ROWS.read(part, source)


def _read_lines(part: Part, characters: int) -> Iterator[Counted]:
    """Documents of whole lines, each at least so many characters long (the last may be shorter)."""
    lines: list[str] = []
    place, length = "", 0
    for number, line in read_lines(part):
        place = place or f"{part.place}:{number}"
        lines.append(line)
        length += len(line) + 1
        if length > characters:
            yield len(lines), Document(place, "\n".join(lines))
            lines, place, length = [], "", 0
    if lines:
        yield len(lines), Document(place, "\n".join(lines))


def _document(id_: str, row: dict[str, Any]) -> Document:
    return Document(id_, document_text(row, "text"))


_ROWS = row_reader(_document, ("text",))
TEXT = Reader(_read, _ROWS.fields, (".txt", *ROW_SUFFIXES))
