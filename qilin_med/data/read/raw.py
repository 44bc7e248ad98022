"""A row as it stands in a file, and why it may be of no use."""

from typing import Any, NamedTuple


class RawRow(NamedTuple):
    id: str
    """Its place: "place:line" of lines and tables, "place#index" of arrays and .parquet; "~2" behind it: the second record,
    or the second answer of one."""
    value: Any
    """JSON: any value; tables: {column: text}; a line of a .txt: {"text": line}."""
    text: str | None = None
    """The original line, where the row is one."""
    fault: str | None = None
    """Why the row could not be parsed."""


class UnusableRow(ValueError):
    """Carries the reason for which a row is skipped: what makes reasons alike, then perhaps a colon and the details."""
