"""What a report is made of, whatever it is written as."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Heading:
    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Items:
    kind: ClassVar[str] = "items"
    items: list[str]


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Table:
    kind: ClassVar[str] = "table"
    caption: str
    header: list[str]
    rows: list[list[str]]
    ours: int = 0
    """So many rows at the end are ours, set apart from published ones."""
    note: str = ""
    is_prose: bool = False
    """Cells hold sentences, which break into lines."""

    def is_number(self, column: int) -> bool:
        """Whether all that stands in a column are numbers (then it is set flush right)."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(_NUMBER.match(cell) for cell in cells)


@dataclass(frozen=True)
class Figure:
    kind: ClassVar[str] = "figure"
    title: str
    svg: str
    said: str
    """The figure in words, for readers and formats without pictures."""


@dataclass(frozen=True)
class Figures:
    kind: ClassVar[str] = "figures"
    figures: list[Figure]


@dataclass(frozen=True)
class Fold:
    """Blocks that are closed at first."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: list["Block"]


Block = Text | Heading | Items | Code | Table | Figures | Fold


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Document:
    title: str
    lead: list[str]
    sections: list[Section] = field(default_factory=list)


# Beginnings count: "49.5 [44.9, 54.2]", "0.92 ± 0.02" and "1,024" are numbers.
_NUMBER = re.compile(r"[-+−<]? ?\d[\d,.]*(e-?\d+)?%?( [\[±(].*)?$")


# ------------------------------------------------------------------------------------------------------ markdown


def to_markdown(document: Document) -> str:
    parts = [f"# {_escape(document.title)}", *map(_escape, document.lead)]
    for section in document.sections:
        parts += [f"## {section.title}", *_blocks(section.blocks)]
    return "\n\n".join(parts) + "\n"


def _blocks(blocks: Iterable[Block]) -> list[str]:
    return [part for block in blocks for part in _block(block)]


def _block(block: Block) -> list[str]:
    match block:
        case Text(text):
            return [_escape(text)]
        case Heading(text):
            return [f"### {_escape(text)}"]
        case Items(items):
            return ["\n".join(f"- {_escape(item)}" for item in items)]
        case Code(text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return [f"{fence}\n{text}\n{fence}"]
        case Table():
            notes = [_escape(block.note)] if block.note else []
            return [f"**{_escape(block.caption)}**", markdown_table(block), *notes]
        case Figures(figures):
            return ["\n".join(f"- {_escape(figure.title)}: {_escape(figure.said)}" for figure in figures)]
        case Fold(title, inner):
            return [f"<details><summary>{_escape(title)}</summary>", *_blocks(inner), "</details>"]


def markdown_table(table: Table) -> str:
    """An aligned Markdown table."""
    rows = [[_escape(cell) for cell in row] for row in [table.header, *table.rows]]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(table.header))]
    is_number = [table.is_number(column) for column in range(len(widths))]

    def line(cells: list[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, is_number, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, is_number, strict=True)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = re.sub(
        r"([\\`*|]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;")
    )
    return re.sub(r"\s*\n\s*", "<br>", escaped.strip())
