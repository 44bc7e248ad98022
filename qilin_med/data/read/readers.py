"""Raw published files -> records. Every row is counted, and becomes a record or is skipped with a reason."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

from qilin_med.config.experiment import Kind, RawFiles
from qilin_med.data.read.files import list_files, not_text, open_parts
from qilin_med.data.read.formats import chats, documents, exams, preferences
from qilin_med.data.read.formats.reading import Counted, Reader
from qilin_med.errors import UserError
from qilin_med.records import Skipped

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
    "instruct_chat": chats.instruct_chat,
    "multiturn_chat": chats.multiturn_chat,
    "hc3": chats.hc3,
    "safety_prompts": chats.safety_prompts,
    "preference": preferences.preference,
    "zhongjing": preferences.zhongjing,
}


def raw_files(source: RawFiles) -> list[Path]:
    """The files of a source, in the order of its paths; folders give, in name order, those that the kind can read.

    UserError: a path is missing, empty or of another kind; `columns` maps a field that the kind does not have.
    """
    reader = READERS[source.kind]
    if unknown := source.columns.keys() - set(reader.fields):
        raise UserError(
            f"source '{source.name}': columns maps '{min(unknown)}', which kind {source.kind} does not have; it has: "
            + ", ".join(reader.fields)
        )
    return [file for path in source.paths for file in list_files(Path(path), reader.suffixes)]


def read_raw(source: RawFiles, file: Path) -> Iterator[Counted]:
    """(rows, record) of one of `raw_files`, streamed. The rows add up to the raw rows of the file: mostly 1 each, 0 for
    a further record out of a row, n for a passage made of n triples. Unusable rows come as Skipped.

    UserError: an archive or a whole-file .json is broken.
    """
    for rows, record in read_file(file, READERS[source.kind], source):
        if isinstance(record, Skipped):
            # Without the details, so that reasons can be counted.
            record = replace(record, reason=re.split(r'[:"]| null$', record.reason)[0].strip())
        yield rows, record


def read_file(file: Path, reader: Reader, source: RawFiles, strict: bool = False) -> Iterator[Counted]:
    """As `read_raw`, with all that is known of a reason. `strict`: a byte that is no text is a UserError; else it
    becomes U+FFFD, by which cleaning finds it."""
    part = None
    try:
        for part in open_parts(file, reader.suffixes, strict):
            yield from reader.read(part, source)
    except UnicodeDecodeError:
        raise not_text(part) from None
    except (BadZipFile, EOFError, zlib.error, OSError) as error:
        # What unpacks raises OSErrors too; those of a failing disk have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file}: cannot be unpacked ({error}); download it again") from None
