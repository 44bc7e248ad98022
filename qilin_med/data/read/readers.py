"""Raw published files and training files -> records. Every row becomes a record or is skipped with a reason."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from qilin_med.config.experiment import DataSource, Kind, RawFiles
from qilin_med.data.read.expressions import check_expression
from qilin_med.data.read.files import Span, content_suffix, list_files, not_text, open_parts
from qilin_med.data.read.formats import chats, documents, exams, preferences
from qilin_med.data.read.formats.reading import Counted, Fields, Reader, row_reader
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Preference, Skipped

READERS: dict[Kind, Reader] = {
    "text": documents.TEXT,
    "huatuo": chats.huatuo,
    "exam": exams.EXAM,
    "cpubmed_kg": documents.CPUBMED_KG,
    "xywy_kg": documents.xywy_kg,
    "39health_kg": documents.health39_kg,
    "department_qa": chats.department_qa,
    "meddialog": chats.MEDDIALOG,
    "chat": chats.chat,
    "instruct_chat": chats.chat,
    "multiturn_chat": chats.multiturn_chat,
    "hc3": chats.hc3,
    "safety_prompts": chats.safety_prompts,
    "preference": preferences.preference,
    "zhongjing": preferences.zhongjing,
}

# ----------------------------------------------------------------------------------------------------- raw files


def raw_files(source: RawFiles) -> list[Path]:
    """The files of a source, in the order of its paths; folders give, in name order, those that the kind can read.

    UserError: a path is missing, empty or of another kind; `columns` maps a field that the kind does not have, or is no
    expression.
    """
    reader = READERS[source.kind]
    for place, expression in {"rows": source.rows, **{f"columns.{k}": v for k, v in source.columns.items()}}.items():
        if expression:
            check_expression(source.name, place, expression)
    unknown = source.columns.keys() - set(reader.fields)
    if unknown and not reader.keeps_others:
        raise UserError(
            f"source '{source.name}': columns maps '{min(unknown)}', which kind {source.kind} does not have; it has: "
            + ", ".join(reader.fields)
        )
    return [file for path in source.paths for file in list_files(Path(path), _suffixes(reader, source))]


def _suffixes(reader: Reader, source: RawFiles) -> tuple[str, ...]:
    return (*reader.suffixes, ".txt") if source.header and ".txt" not in reader.suffixes else reader.suffixes


def read_raw(source: RawFiles, file: Path, span: Span | None = None) -> Iterator[Counted]:
    """(rows, record) of one of `raw_files`, or of a span of it, streamed. The rows add up to the raw rows of the file:
    mostly 1 each, 0 for a further record out of a row, n for a passage made of n triples. Unusable rows come as Skipped.

    UserError: an archive or a whole-file .json is broken.
    """
    for rows, record in read_file(file, READERS[source.kind], source, span=span):
        if isinstance(record, Skipped):
            # Without the details, so that reasons can be counted.
            record = replace(record, reason=re.split(r'[:"]| null$', record.reason)[0].strip())
        yield rows, record


def read_file(
    file: Path, reader: Reader, source: RawFiles, strict: bool = False, span: Span | None = None
) -> Iterator[Counted]:
    """As `read_raw`, with reasons in full. `strict`: a byte that is no text is a UserError, else it becomes U+FFFD."""
    part = None
    if span and span.start == span.end:
        return
    try:
        for part in open_parts(file, _suffixes(reader, source), strict, source.max_expansion, span):
            yield from reader.read(part, source)
    except UnicodeDecodeError:
        raise not_text(part) from None
    except (BadZipFile, EOFError, LZMAError, NotImplementedError, zlib.error, OSError) as error:
        # Decompression raises OSErrors too; those of a failing disk have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file}: cannot be unpacked ({error}); download it again") from None


# ------------------------------------------------------------------------------------------------ training files


def find_files(sources: list[DataSource]) -> list[tuple[Path, DataSource]]:
    """The data files of all sources, in order; a folder is read recursively in name order, as `list_files` tells.

    UserError: a path is missing, empty or holds nothing usable.
    """
    suffixes = READERS["text"].suffixes
    return [(file, source) for source in sources for file in list_files(Path(source.path), suffixes, source.split)]


def read_documents(sources: list[DataSource]) -> Iterator[Document | Skipped]:
    """Documents: the lines of .txt files; elsewhere the field `source.text`, a string or a list of strings (joined by
    newlines). Text is kept as it stands. UserError: a file is no text, cannot be unpacked, or is a broken .json."""
    return _read(sources, "text")


def read_named_documents(sources: list[DataSource]) -> Iterator[tuple[Document, str] | Skipped]:
    """As `read_documents`, each with the name of its source: `id` and `source` of the row where it has them (a built
    corpus does), else the place and the name of the file."""
    return _read(sources, "text", named=True)


def read_chats(sources: list[DataSource]) -> Iterator[Chat | Skipped]:
    """Conversations in the layouts of kind `chat` (ChiMed, ShareGPT, messages, instructions, ...), one or more turns.

    Contents are stripped of surrounding white space. A chat must be: an optional system text, then questions and
    answers in turn, ending with an answer; any other is skipped. UserError as in `read_documents`.
    """
    return _read(sources, "chat")


def read_preferences(sources: list[DataSource]) -> Iterator[Preference | Skipped]:
    """Pairs of answers in the layouts of kind `preference`: question/response_chosen/response_rejected,
    conversations/chosen/rejected and prompt/chosen/rejected. Contents are stripped of surrounding white space.
    UserError as in `read_documents`."""
    return _read(sources, "preference")


def _read(sources: list[DataSource], kind: Kind, named: bool = False) -> Iterator[Any]:
    for file, source in find_files(sources):
        yield from read_training_file(kind, file, source, named=named)


def read_training_file(
    kind: Kind, file: Path, source: DataSource, span: Span | None = None, named: bool = False
) -> Iterator[Any]:
    """The records of one of `find_files`, or of a span of it."""
    reader = READERS[kind]
    if content_suffix(file.name) not in (*reader.suffixes, ".zip"):
        raise UserError(
            f"{file}: a .txt file holds only documents (pretraining); expected {', '.join(reader.suffixes)} files here"
        )
    if named:
        reader = row_reader(suffixes=reader.suffixes)(partial(_named_document, file.name))
    raw = as_raw(kind, file, source)
    yield from (record for _, record in read_file(file, reader, raw, strict=True, span=span))


def as_raw(kind: Kind, file: Path, source: DataSource) -> RawFiles:
    columns = {"text": source.text} if kind == "text" else {}
    return RawFiles(name=file.name, kind=kind, paths=[str(file)], columns=columns)


def _named_document(file: str, id_: str, row: Fields) -> tuple[Document, str]:
    name, source = (str(row[key]) if isinstance(row.get(key), str | int) else "" for key in ("id", "source"))
    return Document(name or id_, documents.document_text(row)), source or file
