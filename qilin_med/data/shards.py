"""A build in progress on disk: numbered shards of records as JSON lines, and arrays beside them.

A record's number is shard << 32 | row, a uint64 that names it in every array of a build. Files get their names only when
whole, so that a killed task leaves nothing that a later run would take for done.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from qilin_med.artifact import written_whole
from qilin_med.config.experiment import STAGES, StageName
from qilin_med.console.progress import tally

ROW_BITS = 32
COUNTED_LINES = 500  # for the progress
OPEN_SHARDS = 200  # at a time, by two files each: many systems allow 1,024 open files
ROW_MASK = (1 << ROW_BITS) - 1
Row = dict[str, Any]


def save(path: Path, array: np.ndarray) -> None:
    with written_whole(path) as file:
        np.save(file, array)


def save_json(path: Path, value: Any) -> None:
    with written_whole(path) as file:
        file.write(orjson.dumps(value))


def load(path: Path) -> np.ndarray:
    """An array, memory-mapped unless it is empty (which mmap refuses). As long as it or a view of it is kept, its file is
    open: what is taken from the files of all shards or parts is copied."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.load(path)


def write_json_lines(path: Path, rows: Iterable[Row], size: float = math.inf) -> list[int]:
    """Write rows as JSON lines, until they are so many bytes; returns where each begins, and the end."""
    offsets = [0]
    with written_whole(path) as file:
        for row in rows:
            offsets.append(offsets[-1] + file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)))
            if offsets[-1] >= size:
                break
    return offsets


def read_json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        yield from map(orjson.loads, file)


class JsonLines:
    """Lines of `write_json_lines`, any of them by its number from 0. Memory-mapped."""

    def __init__(self, path: Path, offsets: Path):
        # asarray: views without the price that np.memmap puts on each slice.
        self._lines, self._offsets = np.asarray(np.memmap(path, mode="r")), np.asarray(load(offsets))

    def __getitem__(self, number: int) -> Row:
        start, end = self._offsets[number : number + 2].tolist()
        return orjson.loads(self._lines[start:end].tobytes())


def batched(items: Iterable[Any], size: int, weight: Callable[[Any], int] = lambda item: 1) -> Iterator[list[Any]]:
    """Items in lists that each weigh as much, or more by less than their last item; what is left at the end comes last."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += weight(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def number_of(shard: int, rows: np.ndarray) -> np.ndarray:
    return np.uint64(shard << ROW_BITS) | np.asarray(rows, np.uint64)


def shard_of(numbers: np.ndarray) -> np.ndarray:
    return numbers >> np.uint64(ROW_BITS)


def row_of(numbers: np.ndarray) -> np.ndarray:
    return numbers & np.uint64(ROW_MASK)


def of_shard(found: np.ndarray, shard: int) -> np.ndarray:
    """The records of a shard in an array that lies in the order of its column "record"."""
    numbers = np.array([shard << ROW_BITS, (shard + 1) << ROW_BITS], np.uint64)
    return found[slice(*np.searchsorted(found["record"], numbers))]


@dataclass(frozen=True)
class Workspace:
    """The work folder of a build. `clean/` has the records that passed cleaning, with their ranks."""

    root: Path
    stages: tuple[StageName, ...]
    """The training set of each shard."""
    parts: int
    """Parts that hash values are dealt out to."""

    def path(self, step: str, task: int, suffix: str = "npy") -> Path:
        return self.root / step / f"{task:05d}.{suffix}"

    def write(self, shard: int, rows: Iterable[Row], ranks: list[int], size: float = math.inf) -> None:
        """Write a shard of clean records, until they are so many bytes. `ranks` may be filled while `rows` is consumed.

        Ranks (uint64) decide which of several records with the same text is kept: that of the earlier source, then that
        with the smaller content hash. They do not depend on the names or the order of files.
        """
        offsets = write_json_lines(self.path("clean", shard, "jsonl"), rows, size)
        save(self.path("clean", shard, "offsets.npy"), np.array(offsets, np.uint64))
        save(self.path("clean", shard, "ranks.npy"), np.array(ranks, np.uint64))

    def lines(self, shard: int) -> Iterator[bytes]:
        with self.path("clean", shard, "jsonl").open("rb") as file:
            for some in batched(file, COUNTED_LINES):
                tally.add(sum(map(len, some)))
                yield from some

    def size(self, stages: tuple[StageName, ...] = STAGES) -> int:
        """Bytes of the clean records."""
        paths = (self.path("clean", shard, "jsonl") for shard, stage in enumerate(self.stages) if stage in stages)
        return sum(path.stat().st_size for path in paths)

    def rows(self, shard: int) -> Iterator[Row]:
        return map(orjson.loads, self.lines(shard))

    def ranks(self, shard: int) -> np.ndarray:
        return load(self.path("clean", shard, "ranks.npy"))

    def random_access(self) -> Callable[[int], Row]:
        """A function that gives any record by its number."""

        @lru_cache(OPEN_SHARDS)
        def lines_of(shard: int) -> JsonLines:
            return JsonLines(self.path("clean", shard, "jsonl"), self.path("clean", shard, "offsets.npy"))

        return lambda number: lines_of(number >> ROW_BITS)[number & ROW_MASK]

    def deal(self, step: str, task: int, pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Save a task's items, each for the part that the second array of a piece says."""
        borders = []
        for items, parts in pieces:
            order = np.argsort(parts.astype(np.uint16), kind="stable")
            save(self.path(step, task, f"{len(borders)}.npy"), items[order])
            borders.append(np.concatenate(([0], np.cumsum(np.bincount(parts, minlength=self.parts)))))
        save(self.path(step, task, "borders.npy"), np.stack(borders))

    def dealt(self, step: str, task: int, part: int) -> np.ndarray:
        """The items that a task has saved for a part."""
        borders = load(self.path(step, task, "borders.npy"))[:, part : part + 2].tolist()
        saved = [load(self.path(step, task, f"{piece}.npy"))[slice(*ends)] for piece, ends in enumerate(borders)]
        return np.array(np.concatenate(saved))

    def found(self, step: str, shard: int) -> np.ndarray:
        """What the tasks of a step, one for each part, have found of a shard. They save it in the order of records."""
        return np.concatenate([np.array(of_shard(load(self.path(step, part)), shard)) for part in range(self.parts)])

    def load_parts(self, step: str) -> np.ndarray:
        return np.concatenate([np.array(load(self.path(step, part))) for part in range(self.parts)])
