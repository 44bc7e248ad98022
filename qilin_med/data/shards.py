"""Records on disk while a corpus is built: numbered shards of JSON lines with random access, and arrays beside them.

A record's number is shard << 32 | row, a uint64 that names it in every array of a build. Files appear under their
names only when whole, so that a killed task leaves nothing that a later run would take for done.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from qilin_med.artifact import written_whole

ROW_BITS = 32
NUMBERS = np.dtype(np.uint64)


def save(path: Path, array: np.ndarray) -> None:
    with written_whole(path) as file:
        np.save(file, array)


def save_json(path: Path, value: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write(orjson.dumps(value))


def load(path: Path) -> np.ndarray:
    """An array, memory-mapped unless it is empty (which mmap refuses)."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.load(path)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> list[int]:
    """Write rows as JSON lines; returns where each begins, and the end."""
    offsets = [0]
    with written_whole(path) as file:
        for row in rows:
            offsets.append(offsets[-1] + file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)))
    return offsets


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def number_of(shard: int, rows: np.ndarray | int) -> Any:
    return np.uint64(shard << ROW_BITS) | np.asarray(rows, NUMBERS)


def shard_of(numbers: np.ndarray) -> np.ndarray:
    return numbers >> np.uint64(ROW_BITS)


def row_of(numbers: np.ndarray) -> np.ndarray:
    return numbers & np.uint64((1 << ROW_BITS) - 1)


class Shards:
    """The cleaned records of a build: `<shard>.jsonl`, `<shard>.offsets.npy`, `<shard>.ranks.npy` in one folder.

    Ranks (uint64) order records by who keeps a text that several have: the earlier source, then the smaller content
    hash. They do not depend on the names or the order of files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[int, tuple[int, np.ndarray]] = {}

    def write(self, shard: int, rows: Iterable[dict[str, Any]], ranks: list[int]) -> None:
        """`ranks` may be filled while `rows` is consumed."""
        offsets = write_lines(self._path(shard, "jsonl"), rows)
        save(self._path(shard, "offsets.npy"), np.array(offsets, NUMBERS))
        save(self._path(shard, "ranks.npy"), np.array(ranks, NUMBERS))

    def rows(self, shard: int) -> Iterator[dict[str, Any]]:
        return read_lines(self._path(shard, "jsonl"))

    def ranks(self, shard: int) -> np.ndarray:
        return load(self._path(shard, "ranks.npy"))

    def size(self, shard: int) -> int:
        return len(self.ranks(shard))

    def ranks_of(self, numbers: np.ndarray) -> np.ndarray:
        """Ranks of records anywhere."""
        ranks = np.empty(len(numbers), NUMBERS)
        for shard in np.unique(shard_of(numbers)):
            mine = shard_of(numbers) == shard
            ranks[mine] = self.ranks(int(shard))[row_of(numbers[mine])]
        return ranks

    def row(self, number: int) -> dict[str, Any]:
        """One record, wherever it stands."""
        shard, row = number >> ROW_BITS, number & ((1 << ROW_BITS) - 1)
        if shard not in self._open:
            descriptor = os.open(self._path(shard, "jsonl"), os.O_RDONLY)
            self._open[shard] = descriptor, load(self._path(shard, "offsets.npy"))
        descriptor, offsets = self._open[shard]
        start, end = int(offsets[row]), int(offsets[row + 1])
        return orjson.loads(os.pread(descriptor, end - start, start))

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{shard:05d}.{suffix}"
