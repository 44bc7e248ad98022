"""Raw published files -> records. Every row is counted, and becomes a record or is skipped with a reason."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

from zstandard import ZstdError

from qilin_med.config.experiment import Kind, RawFiles
from qilin_med.data.read.files import list_files, open_parts
from qilin_med.data.read.formats.dialogues import MEDDIALOG
from qilin_med.data.read.formats.exams import EXAM
from qilin_med.data.read.formats.graphs import CPUBMED_KG, HEALTH39_KG, XYWY_KG
from qilin_med.data.read.formats.instructions import (
    CHAT,
    DEPARTMENT_QA,
    HC3,
    HUATUO,
    INSTRUCT_CHAT,
    MULTITURN_CHAT,
    SAFETY_PROMPTS,
)
from qilin_med.data.read.formats.preferences import PREFERENCE, ZHONGJING
from qilin_med.data.read.formats.reading import Counted, Reader
from qilin_med.data.read.formats.texts import TEXT
from qilin_med.errors import UserError

READERS: dict[Kind, Reader] = {
    "text": TEXT,
    "huatuo": HUATUO,
    "exam": EXAM,
    "cpubmed_kg": CPUBMED_KG,
    "xywy_kg": XYWY_KG,
    "39health_kg": HEALTH39_KG,
    "department_qa": DEPARTMENT_QA,
    "meddialog": MEDDIALOG,
    "chat": CHAT,
    "instruct_chat": INSTRUCT_CHAT,
    "multiturn_chat": MULTITURN_CHAT,
    "hc3": HC3,
    "safety_prompts": SAFETY_PROMPTS,
    "preference": PREFERENCE,
    "zhongjing": ZHONGJING,
}


def raw_files(source: RawFiles) -> list[Path]:
    """The files of a source, in the order of its paths; folders give, in name order, those that the kind can read.

    UserError: a path is missing, empty or of another kind; `columns` maps a field that the kind does not have.
    """
    reader = _reader(source)
    return [file for path in source.paths for file in list_files(Path(path), reader.suffixes)]


def read_raw(source: RawFiles, file: Path) -> Iterator[Counted]:
    """(rows, record) of one of `raw_files`, streamed. The rows add up to the raw rows of the file: mostly 1 each, 0 for
    a further record out of a row, n for a passage made of n triples. Unusable rows come as Skipped.

    UserError: an archive or a whole-file .json is broken; `columns` as in `raw_files`.
    """
    reader = _reader(source)
    try:
        for part in open_parts(file, reader.suffixes):
            yield from reader.read(part, source)
    except (BadZipFile, EOFError, ZstdError, zlib.error) as error:
        raise UserError(f"{file}: cannot be unpacked ({error}); download it again") from None
    # gzip's own error is an OSError, like those of a failing disk.
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{file}: cannot be unpacked ({error}); download it again") from None


def _reader(source: RawFiles) -> Reader:
    reader = READERS[source.kind]
    if unknown := source.columns.keys() - set(reader.fields):
        raise UserError(
            f"source '{source.name}': columns maps '{min(unknown)}', which kind {source.kind} does not have; it has: "
            + ", ".join(reader.fields)
        )
    return reader
