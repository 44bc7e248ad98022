"""Raw files as published: found in folders, opened in place (.gz, .zst, .zip), decoded (UTF-8 or GB18030)."""

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import zstandard

from qilin_med.errors import UserError
from qilin_med.records import RAW_CHARACTERS, Skipped

COMPRESSIONS = (".gz", ".zst")
# Of the head of a file we judge its encoding and whether a .json holds lines.
HEAD_BYTES = 1 << 20
PASSED_OVER = re.compile(r"\.md$|^(readme|licen[cs]e|copying|notice)\b|^manifest\.json$", re.IGNORECASE)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class UnusableRow(ValueError):
    """Carries the reason for which a row is skipped."""


def skipped(id_: str, reason: str, raw: Any) -> Skipped:
    """`raw` is the row's text, or the row as parsed."""
    try:
        text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
    except RecursionError:
        text = "nested too deep to be shown"
    return Skipped(id_, reason, LONE_SURROGATE.sub("\ufffd", text[:RAW_CHARACTERS]))


# ------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True, slots=True)
class Part:
    """One stream of rows: a file, or a member of an archive (then valid until the next part is asked for)."""

    place: str
    """First half of a record's id: "path" or "archive.zip!member"."""
    suffix: str
    """Of the content, in lower case: ".csv" for rows.csv.gz."""
    open_bytes: Callable[[], BinaryIO]


def existing(path: Path, expected: str) -> Path:
    """The path itself. UserError: there is nothing."""
    if not path.exists():
        raise UserError(f"{path}: no such data file or folder; {expected}")
    return path


def with_content(file: Path) -> Path:
    """The file itself. UserError: it is empty."""
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; fill it or take it out of the data")
    return file


def list_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file, or a folder's files of these kinds, read recursively in name order.

    Hidden names, licences and read-me files are passed over. UserError: the path is missing, a file is empty or of an
    unknown kind, a folder holds nothing usable.
    """
    expected = f"expected {', '.join(suffixes)}, also as .gz, .zst or in a .zip"
    if not existing(path, expected).is_dir():
        if not _is_readable(path.name, suffixes):
            raise UserError(f"{path}: unknown kind of file '{path.suffix}'; {expected}")
        return [with_content(path)]
    wanted = (file for file in sorted(path.rglob("*")) if _is_wanted(file.relative_to(path), suffixes))
    files = [with_content(file) for file in wanted if file.is_file()]
    if not files:
        raise UserError(f"{path}: no usable file in this folder; {expected}")
    return files


def _is_wanted(name: Path, suffixes: tuple[str, ...]) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return not hidden and not PASSED_OVER.search(name.name) and _is_readable(name.name, suffixes)


def _is_readable(name: str, suffixes: tuple[str, ...]) -> bool:
    return content_suffix(name) in (*suffixes, ".zip")


def content_suffix(name: str) -> str:
    """The suffix below compressions: ".csv" for rows.csv and rows.csv.gz."""
    path = Path(name.lower())
    while path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix


# ------------------------------------------------------------------------------------------------------- opening


def open_parts(file: Path, suffixes: tuple[str, ...]) -> Iterator[Part]:
    """The file itself, or the members of a .zip that have one of the suffixes, in name order.

    UserError: the archive is broken, locked, or holds no such member.
    """
    if content_suffix(file.name) != ".zip":
        yield Part(str(file), content_suffix(file.name), partial(_unpacked, file.name, partial(file.open, "rb")))
        return
    with _archive(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.filename)
        wanted = [m for m in members if not m.is_dir() and _is_member(m.filename, suffixes)]
        if not wanted:
            raise UserError(f"{file}: no usable file in this archive; expected {', '.join(suffixes)}")
        for member in wanted:
            if member.flag_bits & 1:
                raise UserError(f"{file}: '{member.filename}' is locked with a password; unpack the archive")
            name = member.filename
            opened = partial(_unpacked, name, partial(archive.open, member))
            yield Part(f"{file}!{name}", content_suffix(name), opened)


def _archive(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise UserError(f"{file}: no readable .zip ({error}); download it again") from None


def _is_member(name: str, suffixes: tuple[str, ...]) -> bool:
    return _is_wanted(Path(name), suffixes) and content_suffix(name) != ".zip"


def _unpacked(name: str, open_packed: Callable[[], BinaryIO]) -> BinaryIO:
    stream = open_packed()
    while (suffix := Path(name.lower()).suffix) in COMPRESSIONS:
        stream = gzip.GzipFile(fileobj=stream) if suffix == ".gz" else io.BufferedReader(_ZstandardStream(stream))
        name = name[: -len(suffix)]
    return stream


class _ZstandardStream(io.RawIOBase):
    """Frames one after the other. zstandard's own reader takes a cut-off file for a whole one; this one does not."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._next_chunk()
            if not chunk:
                return 0
            self._ready = memoryview(self._frame.decompress(chunk))
            self._fresh = False
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _next_chunk(self) -> bytes:
        rest = b""
        if self._frame.eof:
            rest, self._frame, self._fresh = self._frame.unused_data, zstandard.ZstdDecompressor().decompressobj(), True
        chunk = rest or self._stream.read(1 << 16)
        if not chunk and not self._fresh:
            raise EOFError("the file ends within a frame")
        return chunk

    def close(self) -> None:
        self._stream.close()
        super().close()


# ------------------------------------------------------------------------------------------------------ decoding


def open_text(part: Part, newline: str = "\n") -> TextIO:
    """The part decoded as UTF-8 (with or without a byte order mark) or GB18030, whichever its first megabyte is.

    A later byte that does not belong becomes U+FFFD, by which cleaning finds it.
    """
    encoding = _encoding(read_head(part))
    return io.TextIOWrapper(part.open_bytes(), encoding=encoding, errors="replace", newline=newline)


def read_head(part: Part) -> bytes:
    """The first megabyte."""
    with part.open_bytes() as stream:
        return stream.read(HEAD_BYTES)


def decode_head(head: bytes) -> str:
    return head.decode(_encoding(head), errors="replace")


def _encoding(head: bytes) -> str:
    """The encoding in which the fewest bytes are wrong: one bad byte does not make UTF-8 a Chinese code page."""
    wrong = {name: head.decode(name, errors="replace").count("\ufffd") for name in ("utf-8-sig", "gb18030")}
    return min(wrong, key=lambda name: wrong[name])


def read_lines(part: Part) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    with open_text(part) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")
