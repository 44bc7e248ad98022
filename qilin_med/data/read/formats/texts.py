"""Running text: books, web pages, guidelines."""

from collections.abc import Iterator

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.files import Part, read_lines
from qilin_med.data.read.formats.reading import (
    LONE_SURROGATE,
    Counted,
    Fields,
    Reader,
    UnusableRow,
    name_of,
    row_reader,
)
from qilin_med.data.read.tables import ROW_SUFFIXES
from qilin_med.records import Document


def document_text(row: Fields) -> str:
    """The field `text`, a string or a list of strings (joined by newlines), as it stands."""
    value = row.get("text")
    if value is None:
        raise UnusableRow("no field 'text'")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise UnusableRow(f"wrong type: 'text' is {name_of(value)}, expected text")
    if not value.strip():
        raise UnusableRow("empty text")
    if LONE_SURROGATE.search(value):
        raise UnusableRow("not Unicode: half a surrogate pair")
    return value


def _read(part: Part, source: RawFiles) -> Iterator[Counted]:
    """Lines of a .txt are joined to documents of at least `join_lines` characters (the last may be shorter)."""
    characters = getattr(source, "join_lines", 0)
    if not characters or part.suffix != ".txt":
        yield from _ROWS.read(part, source)
        return
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


_ROWS = row_reader(lambda id_, row: Document(id_, document_text(row)), ("text",), (".txt", *ROW_SUFFIXES))
TEXT = Reader(_read, _ROWS.fields, _ROWS.suffixes)
