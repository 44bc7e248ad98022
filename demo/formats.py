"""Rows -> the bytes of a raw file, in the formats in which such data are published."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

Broken = str  # a row that is written as it stands


def lines(rows: Iterable[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def json_lines(rows: Iterable[dict[str, Any] | Broken]) -> bytes:
    return lines(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)


def json_array(rows: Iterable[dict[str, Any]]) -> bytes:
    return (json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n").encode()


def packed_json_lines(rows: Iterable[dict[str, Any] | Broken]) -> bytes:
    return gzip.compress(json_lines(rows), mtime=0)  # the time would change the bytes


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], encoding: str) -> bytes:
    """A CSV. Encodings: "gb18030", or "utf-8-sig" (with a byte order mark)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([columns, *rows])
    return text.getvalue().encode(encoding)


def dialogue_blocks(rows: Iterable[Sequence[str]]) -> bytes:
    """MedDialog: a row holds the lines of a block, which is numbered and set off by an empty line."""
    blocks = ("\n".join((f"id={number}", "", *row)) for number, row in enumerate(rows, 1))
    return "".join(f"{block}\n\n" for block in blocks).encode()
