"""Raw files written and read in tests."""

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import zstandard

from qilin_med.config.corpus import RawFiles
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.records import Chat, Document, Message, Preference


def source(kind: str, *paths: Path, **columns: str) -> RawFiles:
    return RawFiles(name="x", kind=kind, paths=[str(path) for path in paths], columns=columns)


def read(kind: str, *paths: Path, **columns: str) -> list:
    """(rows, record) of all files."""
    files = source(kind, *paths, **columns)
    return [pair for file in raw_files(files) for pair in read_raw(files, file)]


def records(kind: str, *paths: Path, **columns: str) -> list:
    return [record for _, record in read(kind, *paths, **columns)]


def chat(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


def content(record):
    """What a record says, without its place."""
    if isinstance(record, Chat):
        return tuple(message.content for message in record.messages)
    if isinstance(record, Preference):
        return (*(message.content for message in record.prompt), record.chosen, record.rejected)
    return record.text if isinstance(record, Document) else record.reason


def same(record):
    """A record without its place."""
    return type(record)("", *(getattr(record, name) for name in record.__slots__[1:]))


def pack(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        middle = len(data) // 2
        data = b"".join(zstandard.ZstdCompressor().compress(half) for half in (data[:middle], data[middle:]))
    path.write_bytes(data)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows of texts in the format that the name says; a .zip holds JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    match path.suffixes[0]:
        case ".jsonl":
            return pack(path, lines.encode())
        case ".json":
            return pack(path, json.dumps(rows, ensure_ascii=False, indent=1).encode())
        case ".csv" | ".tsv":
            stream = io.StringIO()
            csv.writer(stream, delimiter="," if path.suffixes[0] == ".csv" else "\t").writerows(table)
            return pack(path, stream.getvalue().encode())
        case ".xlsx":
            book = openpyxl.Workbook()
            for cells in table:
                book.active.append(cells)
            book.save(path)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("rows.jsonl", lines)
    return path
