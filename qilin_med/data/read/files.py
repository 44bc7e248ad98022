"""Files of raw sources and of training data: found in folders, opened in place (.gz, .zst, .zip), and decoded."""

import codecs
import gzip
import io
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from qilin_med.config.experiment import MAX_EXPANSION
from qilin_med.console.progress import tally
from qilin_med.errors import UserError
from qilin_med.records import RAW_CHARACTERS

COMPRESSIONS = (".gz", ".zst")
# The head of a file tells its encoding, and whether a .json holds lines.
HEAD_BYTES = 1 << 20
# A longer line, or element of a JSON array, is skipped: bounds the memory of a reader well below 1 GiB.
LONGEST = 1 << 25
TOO_LONG = f"longer than {LONGEST:,} characters"
READ_BYTES = 1 << 16
EXPANSION_FREE = 1 << 26  # unpacked bytes from which a file's expansion is looked at
READ_AHEAD_BYTES = 1 << 18
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
    max_expansion: int = MAX_EXPANSION
    """How many times its packed size it may unpack to."""
    span: Span | None = None
    """The rows to read, if not all."""

    @property
    def first(self) -> int:
        """How many lines (or elements, or rows) of the file lie before what is read."""
        return self.span.first if self.span else 0


class Line(NamedTuple):
    number: int
    """From 1."""
    text: str
    fault: str | None = None
    """Why the line is not to be used; `text` is then its beginning."""


# ------------------------------------------------------------------------------------------------------- finding


def list_files(path: Path, suffixes: tuple[str, ...], split: str = "") -> list[Path]:
    """The file, or a folder's files of these kinds, read recursively in name order.

    A folder with files of the `split`, such as `train-*`, gives only those (neither its other files nor its sub-folders,
    where held-out parts lie). Hidden names, manifests, licences and read-me files are passed over; any other file that is
    not read is named on the terminal. UserError: the path is missing, a file is empty or of an unknown kind, a link leads
    out of the folder, a folder holds nothing usable.
    """
    expected = f"expected {', '.join(suffixes)}, also as .gz, .zst or in a .zip"
    if not path.exists():
        raise UserError(f"{path}: no such data file or folder; {expected}")
    if path.is_dir():
        unread: list[Path] = []
        files = _walk(path, (*suffixes, ".zip"), split, path.resolve(), unread)
        name_unread(path, tuple(str(file.relative_to(path)) for file in unread), expected)
        for archive in (file for file in files if file.suffix.lower() == ".zip"):
            name_unread(archive, _unread_members(archive, suffixes), expected)
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


def _walk(folder: Path, suffixes: tuple[str, ...], split: str, root: Path, unread: list[Path]) -> list[Path]:
    entries = [entry for entry in sorted(folder.iterdir()) if not _is_passed_over(entry.name)]
    for entry in entries:
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            raise UserError(f"{entry}: a link out of the data folder, to {entry.resolve()}; name that in the configuration"
                            " itself, or remove the link")  # fmt: skip
    files = [entry for entry in entries if entry.is_file() and content_suffix(entry.name) in suffixes]
    if split and (chosen := [file for file in files if file.name.startswith(f"{split}-")]):
        return chosen
    # A link to a folder inside would be read twice, or for ever.
    folders = [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]
    read = {*files, *folders}
    unread += [entry for entry in entries if entry not in read]
    return sorted(files + [file for inner in folders for file in _walk(inner, suffixes, split, root, unread)])


@cache
def name_unread(place: Path, names: tuple[str, ...], expected: str) -> None:
    """One line for each folder or archive, once in a process."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"{place}: not read: {', '.join(names[:5])}{more}; {expected}", flush=True)


def _unread_members(file: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        names = (member.filename for member in archive.infolist() if not member.is_dir())
        return tuple(n for n in names if not (_is_data(n, suffixes) or any(map(_is_passed_over, Path(n).parts))))
    return ()  # whoever reads it will say so


def _is_passed_over(name: str) -> bool:
    return name.startswith(HIDDEN) or PASSED_OVER.search(name) is not None


def _is_data(name: str, suffixes: tuple[str, ...]) -> bool:
    return content_suffix(name) in suffixes and not any(map(_is_passed_over, Path(name).parts))


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


def open_parts(
    file: Path,
    suffixes: tuple[str, ...],
    strict: bool = False,
    max_expansion: int = MAX_EXPANSION,
    span: Span | None = None,
) -> Iterator[Part]:
    """The file itself (or a span of it), or the members of a .zip that have one of the suffixes, in name order.

    UserError: the archive is broken, locked, holds no such member, or expands beyond `max_expansion`.
    """
    if content_suffix(file.name) != ".zip":
        opened = partial(_unpack, str(file), partial(file.open, "rb"), file.stat().st_size, max_expansion)
        yield Part(str(file), content_suffix(file.name), opened, strict, max_expansion, span)
        return
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise UserError(f"{file}: no readable .zip ({error}); download it again") from None
    with archive:
        check_expansion(str(file), archive, file.stat().st_size, max_expansion)
        members = [m for m in archive.infolist() if not m.is_dir() and _is_data(m.filename, suffixes)]
        if not members:
            raise UserError(f"{file}: no usable file in this archive; expected {', '.join(suffixes)}")
        for member in sorted(members, key=lambda member: member.filename):
            if member.flag_bits & 1:
                raise UserError(f"{file}: '{member.filename}' is locked with a password; unpack the archive")
            place = f"{file}!{member.filename}"
            opened = partial(_unpack, place, partial(archive.open, member), member.compress_size, max_expansion)
            yield Part(place, content_suffix(member.filename), opened, strict, max_expansion)


def check_expansion(place: str, archive: zipfile.ZipFile, packed: int, max_expansion: int) -> None:
    """UserError: the members of a .zip or .xlsx together expand too far. What a member says of its size is held to when
    it is read."""
    if sum(member.file_size for member in archive.infolist()) > max(EXPANSION_FREE, packed * max_expansion):
        raise _too_large(place, max_expansion)


def _too_large(place: str, max_expansion: int) -> UserError:
    return UserError(
        f"{place}: unpacks to more than {max_expansion} times its size, as a decompression bomb does; unpack it yourself,"
        " or raise max_expansion of its source"
    )


def _unpack(place: str, open_packed: Callable[[], BinaryIO], packed: int, max_expansion: int) -> BinaryIO:
    import pyarrow  # here, because it takes long to import

    stream, name = open_packed(), place
    while (suffix := Path(name.lower()).suffix) in COMPRESSIONS:
        if suffix == ".gz":
            stream = gzip.GzipFile(fileobj=stream)
        else:
            # Unlike zstandard's own reader, it does not take a file that was cut off for a whole one.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd"))
        name = name[: -len(suffix)]
    if name == place:
        return stream
    return io.BufferedReader(_Unpacked(stream, place, packed, max_expansion), READ_BYTES)


class _Unpacked(io.RawIOBase):
    """What a packed file holds. UserError, while it is read, from where it expands too far."""

    def __init__(self, stream: BinaryIO, place: str, packed: int, max_expansion: int):
        self._stream, self._place, self._max_expansion = stream, place, max_expansion
        self._left = max(EXPANSION_FREE, packed * max_expansion)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: memoryview) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        self._left -= len(found)
        if self._left < 0:
            raise _too_large(self._place, self._max_expansion)
        return len(found)


# ------------------------------------------------------------------------------------------------------ decoding


BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
                    codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
# Signs and characters that fill every Chinese text, simplified or traditional. Read in the wrong of the two national
# encodings a text has next to none.
FREQUENT = "，。、：；？的一是不了在人有我他这這个個们們来來大为為和中上到以时時可要病痛症治药藥疗療热熱发發血医醫"


def read_head(part: Part) -> tuple[str, str, bool]:
    """(encoding, the first megabyte decoded, whether that is all).

    The encoding is what a byte order mark says; else UTF-8, unless it has wrong bytes and GB18030 or Big5 has fewer of them
    and more frequent characters: bad bytes do not make UTF-8 a Chinese code page. Where the part is read strictly, a GB18030
    or Big5 with wrong bytes is none.
    """
    with part.open_bytes() as stream:
        start = stream.read(HEAD_BYTES)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")
    text, wrong = _decode(start, encoding)
    if wrong and encoding == "utf-8-sig":
        found = {encoding: (text, wrong), **{name: _decode(start, name) for name in ("gb18030", "big5hkscs")}}
        best = max(found, key=lambda name: sum(map(found[name][0].count, FREQUENT)) - found[name][1])
        if not (part.strict and found[best][1]):
            encoding, text = best, found[best][0]
    return encoding, text, len(start) < HEAD_BYTES


def _decode(start: bytes, encoding: str) -> tuple[str, int]:
    """(text, how many bytes of it were wrong)."""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(start)
    # A text may hold replacement characters of its own.
    own = start.count("\ufffd".encode()) if encoding == "utf-8-sig" else 0
    return text, text.count("\ufffd") - own


def open_text(part: Part, newline: str = "\n") -> TextIO:
    """The part, or its span, decoded as `read_head` says."""
    errors, encoding = "strict" if part.strict else "replace", read_head(part)[0]
    start, end = (part.span.start, part.span.end) if part.span else (0, sys.maxsize)
    if start:
        encoding = encoding.removesuffix("-sig")
    stream = io.BufferedReader(Window(part.open_bytes(), start, end), READ_AHEAD_BYTES)
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)


class Window(io.RawIOBase):
    """The bytes of a stream between two places, counted as they are read."""

    def __init__(self, stream: BinaryIO, start: int, end: int) -> None:
        if start:
            stream.seek(start)
        self._stream, self._left = stream, end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        size = self._stream.readinto(memoryview(buffer)[: self._left])
        self._left -= size
        tally.add(size)
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def bounded_lines(stream: TextIO, first: int = 0) -> Iterator[tuple[int, str, str | None]]:
    """All lines as (number, text, fault), see `Line`, with their ends; `first` lines of the file lie before. One that is
    longer than `LONGEST` is passed over in pieces."""
    for number, line in enumerate(iter(partial(stream.readline, LONGEST), ""), first + 1):
        if len(line) < LONGEST or line.endswith(("\n", "\r")):
            yield number, line, None
            continue
        yield number, line[:RAW_CHARACTERS], f"a line {TOO_LONG}"
        while (line := stream.readline(LONGEST)) and not line.endswith(("\n", "\r")):
            pass


def read_lines(part: Part) -> Iterator[Line]:
    """The lines that are not blank, without their ends."""
    with open_text(part) as stream:
        for number, text, fault in bounded_lines(stream, part.first):
            if fault or text.strip():
                yield Line(number, text.rstrip("\r\n"), fault)


def read_line(stream: BinaryIO) -> tuple[bytes, int]:
    """(beginning of a line, or all of it, how many bytes it has), of a line of any length."""
    line = piece = stream.readline(HEAD_BYTES)
    length = len(line)
    while piece and not piece.endswith(b"\n"):
        piece = stream.readline(HEAD_BYTES)
        length += len(piece)
    return line, length


def share_of_lines(file: Path, lines: int) -> float:
    """Share of a file's bytes that its first lines take; of a packed file a block is read ahead."""
    with file.open("rb") as stream:
        unpacked = _unpack(file.name, lambda: stream, file.stat().st_size, MAX_EXPANSION)
        for _ in range(lines):
            read_line(unpacked)
        return stream.tell() / file.stat().st_size


def not_text(part: Part) -> UserError:
    """Says where a part that is read strictly holds a byte that is no text."""
    encoding, _, _ = read_head(part)
    if encoding.startswith(("utf-16", "utf-32")):  # whose lines do not end in the byte 10
        return UserError(f"{part.place}: not {encoding.upper()} throughout, as its first bytes say; save it as UTF-8")
    decoder, number, at = codecs.getincrementaldecoder(encoding.removesuffix("-sig"))(), 1, 0
    with part.open_bytes() as stream:
        while True:
            piece, pending = stream.readline(READ_BYTES), len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return UserError(
                    f"{part.place}: line {number}, byte {at - pending + error.start + 1} of the file: not"
                    f" {encoding.upper().removesuffix('-SIG')}; expected UTF-8, GB18030 or Big5 throughout: mend the line, or"
                    f" convert the file: iconv -f gb18030 -t utf-8 '{part.place}' > converted{part.suffix}"
                    " (Big5: -f big5)"
                )
            assert piece, f"{part.place} is text throughout"
            number, at = number + piece.endswith(b"\n"), at + len(piece)
