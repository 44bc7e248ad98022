"""The chunks of an index on disk: JSON lines with random access, and the source of each as a number."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson

from qilin_med.data.shards import load, read_lines, save, save_json, write_lines

LINES, OFFSETS, SOURCES, NAMES = "chunks.jsonl", "offsets.npy", "sources.npy", "sources.json"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Characters `start` to `end` of a document."""

    document: str
    source: str
    start: int
    end: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.document}@{self.start}-{self.end}"


def write_chunks(folder: Path, chunks: Iterable[Chunk]) -> Counter:
    """Write chunks as they come (in memory: some 50 bytes for each, none of their text); returns how many each source has."""
    numbers: dict[str, int] = {}
    sources = []

    def rows() -> Iterator[dict]:
        for chunk in chunks:
            sources.append(numbers.setdefault(chunk.source, len(numbers)))
            yield asdict(chunk)

    offsets = write_lines(folder / LINES, rows())
    save(folder / OFFSETS, np.array(offsets, np.uint64))
    save(folder / SOURCES, np.array(sources, np.uint32))
    save_json(folder / NAMES, {"sources": list(numbers)})
    counts = np.bincount(sources, minlength=len(numbers)).tolist() if sources else []
    return Counter(dict(zip(numbers, counts, strict=True)))


class Chunks:
    """The chunks of a folder, by number from 0."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._offsets = load(folder / OFFSETS)
        self._descriptor = os.open(folder / LINES, os.O_RDONLY)
        self.sources: list[str] = orjson.loads((folder / NAMES).read_bytes())["sources"]
        """Names of all sources, in the order of their first chunks."""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Chunk:
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return Chunk(**orjson.loads(os.pread(self._descriptor, end - start, start)))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks in order, streamed."""
        return (Chunk(**row) for row in read_lines(self._folder / LINES))

    def texts(self) -> Iterator[str]:
        return (chunk.text for chunk in self)

    def allowed(self, excluded: list[str]) -> np.ndarray | None:
        """Which chunks stem from none of these sources (bool for each chunk); None: all."""
        if not excluded:
            return None
        numbers = [number for number, name in enumerate(self.sources) if name in excluded]
        return ~np.isin(load(self._folder / SOURCES), numbers)
