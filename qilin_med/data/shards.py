"""A build in progress on disk: numbered shards of records as JSON lines, and arrays beside them.

A record's number is shard << 32 | row, a uint64 that names it in every array of a build. Files get their names only when
whole, so that a killed task leaves nothing that a later run would take for done.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from qilin_med.artifact import written_whole
from qilin_med.config.experiment import StageName

ROW_BITS = 32
Row = dict[str, Any]


def save(path: Path, array: np.ndarray) -> None:
    with written_whole(path) as file:
        np.save(file, array)


def save_json(path: Path, value: Any) -> None:
    with written_whole(path) as file:
        file.write(orjson.dumps(value))


def load(path: Path) -> np.ndarray:
    """An array, memory-mapped unless it is empty (which mmap refuses)."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.load(path)


def write_lines(path: Path, rows: Iterable[Row]) -> list[int]:
    """Write rows as JSON lines; returns where each begins, and the end."""
    offsets = [0]
    with written_whole(path) as file:
        for row in rows:
            offsets.append(offsets[-1] + file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)))
    return offsets


def read_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from map(orjson.loads, file)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def number_of(shard: int, rows: np.ndarray) -> np.ndarray:
    return np.uint64(shard << ROW_BITS) | np.asarray(rows, np.uint64)


def shard_of(numbers: np.ndarray) -> np.ndarray:
    return numbers >> np.uint64(ROW_BITS)


def row_of(numbers: np.ndarray) -> np.ndarray:
    return numbers & np.uint64((1 << ROW_BITS) - 1)


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

    def index_in_stage(self, shard: int) -> int:
        return self.stages[:shard].count(self.stages[shard])

    def write(self, shard: int, rows: Iterable[Row], ranks: list[int]) -> None:
        """Write a shard of clean records. `ranks` may be filled while `rows` is consumed.

        Ranks (uint64) decide which of several records with the same text is kept: that of the earlier source, then that
        with the smaller content hash. They do not depend on the names or the order of files.
        """
        offsets = write_lines(self.path("clean", shard, "jsonl"), rows)
        save(self.path("clean", shard, "offsets.npy"), np.array(offsets, np.uint64))
        save(self.path("clean", shard, "ranks.npy"), np.array(ranks, np.uint64))

    def rows(self, shard: int) -> Iterator[Row]:
        return read_lines(self.path("clean", shard, "jsonl"))

    def ranks(self, shard: int) -> np.ndarray:
        return load(self.path("clean", shard, "ranks.npy"))

    @contextmanager
    def random_access(self) -> Iterator[Callable[[int], Row]]:
        """A function that gives any record by its number."""
        with ExitStack() as files:

            @cache
            def opened(shard: int) -> tuple[Any, np.ndarray]:
                file = files.enter_context(self.path("clean", shard, "jsonl").open("rb", buffering=0))
                return file, load(self.path("clean", shard, "offsets.npy"))

            def record(number: int) -> Row:
                file, offsets = opened(number >> ROW_BITS)
                row = number & ((1 << ROW_BITS) - 1)
                start, end = offsets[row : row + 2].tolist()
                file.seek(start)
                return orjson.loads(file.read(end - start))

            yield record

    def load_all(self, step: str, tasks: int) -> np.ndarray:
        return np.concatenate([load(self.path(step, task)) for task in range(tasks)])
