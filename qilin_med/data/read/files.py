"""Files of raw sources and of training data: found in folders, opened in place (.gz, .zst, .zip), and decoded."""

import codecs
import gzip
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

from qilin_med.errors import UserError

COMPRESSIONS = (".gz", ".zst")
# The head of a file tells its encoding, and whether a .json holds lines.
HEAD_BYTES = 1 << 20
PACKED_FOLD = 3  # how many times larger text is than what it is packed into
HIDDEN = (".", "__MACOSX")
PASSED_OVER = re.compile(r"\.md$|^(readme|licen[cs]e|copying|notice)\b|^manifest\.json$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """Whole rows that follow each other in a file, between two of its bytes (of .parquet: row groups)."""

    start: int
    end: int
    first: int
    """Lines of the file that lie before, or elements of its array, or rows of its groups."""
    is_last: bool


@dataclass(frozen=True, slots=True)
class Part:
    """One stream of rows: a file, or a member of an archive (then valid until the next part is asked for)."""

    place: str
    """First half of a record's id: "path" or "archive.zip!member"."""
    suffix: str
    """Of the content, in lower case: ".csv" for rows.csv.gz."""
    open_bytes: Callable[[], BinaryIO]
    strict: bool
    """Bytes that are no text raise UnicodeDecodeError; else they become U+FFFD, which cleaning looks for."""
    span: Span | None = None
    """The rows to read, if not all."""

    @property
    def first(self) -> int:
        """How many lines (or elements, or rows) of the file lie before what is read."""
        return self.span.first if self.span else 0


# ------------------------------------------------------------------------------------------------------- finding


def list_files(path: Path, suffixes: tuple[str, ...], split: str = "") -> list[Path]:
    """The file, or a folder's files of these kinds, read recursively in name order.

    A folder with files of the `split`, such as `train-*`, gives only those (neither its other files nor its sub-folders,
    where held-out parts lie). Hidden names, manifests, licences and read-me files are passed over. UserError: the path
    is missing, a file is empty or of an unknown kind, a folder holds nothing usable.
    """
    expected = f"expected {', '.join(suffixes)}, also as .gz, .zst or in a .zip"
    if not path.exists():
        raise UserError(f"{path}: no such data file or folder; {expected}")
    if path.is_dir():
        files = _walk(path, suffixes, split)
    elif content_suffix(path.name) in (*suffixes, ".zip"):
        files = [path]
    else:
        raise UserError(f"{path}: unknown kind of file '{path.suffix}'; {expected}")
    if not files:
        raise UserError(f"{path}: no usable file in this folder; {expected}")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty; fill it or take it out of the data")
    return files


def _walk(folder: Path, suffixes: tuple[str, ...], split: str) -> list[Path]:
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if _is_data(entry.name, (*suffixes, ".zip")) and entry.is_file()]
    if split and (chosen := [file for file in files if file.name.startswith(f"{split}-")]):
        return chosen
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(HIDDEN)]
    return sorted(files + [file for inner in folders for file in _walk(inner, suffixes, split)])


def _is_data(name: str, suffixes: tuple[str, ...]) -> bool:
    *_, last = parts = Path(name).parts
    hidden = any(part.startswith(HIDDEN) for part in parts)
    return content_suffix(name) in suffixes and not hidden and not PASSED_OVER.search(last)


def content_suffix(name: str) -> str:
    """The suffix below compressions: ".csv" for rows.csv and rows.csv.gz."""
    path = Path(name.lower())
    while path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix


def unpacked_size(file: Path) -> int:
    """Bytes of the contents, about: only some packed files tell."""
    size, suffix = file.stat().st_size, file.suffix.lower()
    if suffix in (".zip", ".xlsx") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return sum(member.file_size for member in archive.infolist())
    return size * PACKED_FOLD if suffix in (*COMPRESSIONS, ".parquet") else size


# ------------------------------------------------------------------------------------------------------- opening


def open_parts(file: Path, suffixes: tuple[str, ...], strict: bool = False, span: Span | None = None) -> Iterator[Part]:
    """The file itself (or a span of it), or the members of a .zip that have one of the suffixes, in name order.

    UserError: the archive is broken, locked, or holds no such member.
    """
    if content_suffix(file.name) != ".zip":
        opened = partial(_unpack, file.name, partial(file.open, "rb"))
        yield Part(str(file), content_suffix(file.name), opened, strict, span)
        return
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise UserError(f"{file}: no readable .zip ({error}); download it again") from None
    with archive:
        members = [m for m in archive.infolist() if not m.is_dir() and _is_data(m.filename, suffixes)]
        if not members:
            raise UserError(f"{file}: no usable file in this archive; expected {', '.join(suffixes)}")
        for member in sorted(members, key=lambda member: member.filename):
            if member.flag_bits & 1:
                raise UserError(f"{file}: '{member.filename}' is locked with a password; unpack the archive")
            opened = partial(_unpack, member.filename, partial(archive.open, member))
            yield Part(f"{file}!{member.filename}", content_suffix(member.filename), opened, strict)


def _unpack(name: str, open_packed: Callable[[], BinaryIO]) -> BinaryIO:
    import pyarrow  # here, because it takes long to import

    stream = open_packed()
    while (suffix := Path(name.lower()).suffix) in COMPRESSIONS:
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=stream)
        else:
            # Unlike zstandard's own reader, it does not take a file that was cut off for a whole one.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd"))
        name = name[: -len(suffix)]
    return stream


# ------------------------------------------------------------------------------------------------------ decoding


def read_head(part: Part) -> tuple[str, str, bool]:
    """(encoding, the first megabyte decoded, whether that is all).

    The encoding is UTF-8 (with or without a byte order mark) or GB18030, whichever has fewer wrong bytes: one bad byte
    does not make UTF-8 a Chinese code page. Where the part is read strictly, a GB18030 with wrong bytes is none.
    """
    with part.open_bytes() as stream:
        start = stream.read(HEAD_BYTES)
    decoded = {name: codecs.getincrementaldecoder(name)("replace").decode(start) for name in ("utf-8-sig", "gb18030")}
    encoding = min(decoded, key=lambda name: decoded[name].count("\ufffd"))
    if part.strict and "\ufffd" in decoded[encoding]:
        encoding = "utf-8-sig"
    return encoding, decoded[encoding], len(start) < HEAD_BYTES


def open_text(part: Part, newline: str = "\n") -> TextIO:
    """The part, or its span, decoded as `read_head` says."""
    errors, encoding, stream = "strict" if part.strict else "replace", read_head(part)[0], part.open_bytes()
    if part.span:
        stream = io.BufferedReader(Window(stream, part.span.start, part.span.end))
        if part.span.start:
            encoding = encoding.removesuffix("-sig")
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)


class Window(io.RawIOBase):
    """The bytes of a stream between two places."""

    def __init__(self, stream: BinaryIO, start: int, end: int) -> None:
        stream.seek(start)
        self._stream, self._left = stream, end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        size = self._stream.readinto(memoryview(buffer)[: self._left])
        self._left -= size
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def read_lines(part: Part) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    with open_text(part) as stream:
        for number, line in enumerate(stream, part.first + 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def share_of_lines(file: Path, lines: int) -> float:
    """Share of a file's bytes that its first lines take; of a packed file a block is read ahead."""
    with file.open("rb") as stream:
        for _ in islice(_unpack(file.name, lambda: stream), lines):
            pass
        return stream.tell() / file.stat().st_size


def not_text(part: Part) -> UserError:
    """Says where a part that is read strictly holds a byte that is no text."""
    encoding, _, _ = read_head(part)
    before = 0
    with part.open_bytes() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                return UserError(
                    f"{part.place}: line {number}, byte {before + error.start + 1} of the file: not"
                    f" {encoding.upper().removesuffix('-SIG')}; expected UTF-8 or GB18030 throughout: mend the line, or"
                    f" convert the file: iconv -f gb18030 -t utf-8 '{part.place}' > converted{part.suffix}"
                )
            before += len(line)
    raise AssertionError(f"{part.place} is text throughout")
