"""Training files -> records, in any format that the corpus builder reads. Every row becomes a record or is skipped."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import DataSource, Kind, RawFiles
from qilin_med.data.read.files import content_suffix, list_files
from qilin_med.data.read.formats.documents import document_text
from qilin_med.data.read.formats.reading import Fields, row_reader
from qilin_med.data.read.readers import READERS, read_file
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Preference, Skipped


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
        reader = READERS[kind]
        if content_suffix(file.name) not in (*reader.suffixes, ".zip"):
            raise UserError(
                f"{file}: a .txt file holds only documents (pretraining); expected {', '.join(reader.suffixes)} files here"
            )
        if named:
            reader = row_reader(suffixes=reader.suffixes)(partial(_named_document, file.name))
        columns = {"text": source.text} if kind == "text" else {}
        raw = RawFiles(name=file.name, kind=kind, paths=[str(file)], columns=columns)
        for _, record in read_file(file, reader, raw, strict=True):
            yield record


def _named_document(file: str, id_: str, row: Fields) -> tuple[Document, str]:
    name, source = (str(row[key]) if isinstance(row.get(key), str | int) else "" for key in ("id", "source"))
    return Document(name or id_, document_text(row)), source or file
