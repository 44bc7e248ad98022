"""Raw files -> clean records: read, draw, tidy, render for the stage, judge, and look for evaluation questions."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Self

from qilin_med.config.corpus import CorpusSettings
from qilin_med.data.clean import Cleaner
from qilin_med.data.decontaminate import load_index
from qilin_med.data.deduplicate import Workspace, exact_key, save_exact_keys
from qilin_med.data.read.readers import read_raw
from qilin_med.data.read.records import UnusableRow
from qilin_med.data.render import AnyRecord, TrainingRecord, render, stable_id, text_of, to_row
from qilin_med.data.shards import chunks, save_json, write_lines
from qilin_med.records import Skipped

TOGETHER = 500  # records looked up in the index of evaluation questions at once
HASH_BITS = 56  # of a rank; the source's place in the corpus file takes the others
EVALUATION_REASON = "repeats a question of "
CLEAN, SKIPPED, CHANGED, NEAR_MISSES = "clean", "skipped", "changed", "near_misses"


@dataclass(frozen=True, slots=True)
class Task:
    """A file of a source, or one of several stripes of it: every `stripes`-th record from number `stripe` on."""

    source: int
    file: Path
    stripe: int = 0
    stripes: int = 1


class Summed:
    """Counts of one task, which several tasks' add up to."""

    def as_json(self) -> dict[str, Any]:
        # asdict would take a Counter apart.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def sum(cls, rows: Iterable[dict[str, Any]]) -> Self:
        """The sum of what JSON files hold, checked."""
        total = cls()
        for row in rows:
            for name, value in row.items():
                old = getattr(total, name)
                setattr(total, name, old + (Counter(value) if isinstance(value, dict) else value))
        total.check()
        return total


@dataclass(slots=True)
class Counts(Summed):
    """rows = used + sum(skipped); records = kept + sum(dropped)."""

    rows: int = 0
    used: int = 0
    skipped: Counter = field(default_factory=Counter)
    """Rows that give no record, by reason."""
    records: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    """Records by the rule that dropped them."""
    changed: Counter = field(default_factory=Counter)
    """Records by rule that changed their text (one may count for several)."""

    def check(self) -> None:
        assert self.rows == self.used + self.skipped.total(), self
        assert self.records == self.kept + self.dropped.total(), self


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record on its way: as it was read, as it was tidied, and as the stage has it."""

    id: str
    place: str
    tidied: AnyRecord
    rendered: TrainingRecord


def draw(id_: str) -> float:
    """A number in [0, 1) that belongs to a record for ever: the one by which shares and splits are drawn."""
    return _hash(id_) / 2**HASH_BITS


def rank_of(source: int, id_: str) -> int:
    return source << HASH_BITS | _hash(id_)


def _hash(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=HASH_BITS // 8).digest())


class Intake:
    """One task's work. What is dropped or changed is written apart, with the reason."""

    def __init__(self, work: Workspace, settings: CorpusSettings, task: Task):
        self.counts = Counts()
        self._settings, self._task = settings, task
        self._source = settings.sources[task.source]
        self._cleaner = Cleaner(settings.cleaning)
        kept_out = settings.decontamination
        self._index = load_index(work.root / "evaluation", kept_out.ngram, kept_out.near_miss)
        self._apart: dict[str, list[dict[str, Any]]] = {SKIPPED: [], CHANGED: [], NEAR_MISSES: []}
        self._keys: list[bytes] = []
        self._ranks: list[int] = []

    def write(self, work: Workspace, shard: int) -> None:
        """Task: a shard of clean records, and beside it what was skipped, changed, counted."""
        work.shards.write(shard, self._rows(), self._ranks)
        save_exact_keys(work, shard, self._keys)
        for name, rows in self._apart.items():
            write_lines(work.path(name, shard, "jsonl"), rows)
        self.counts.check()
        save_json(work.path(CLEAN, shard, "counts.json"), self.counts.as_json())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for some in chunks(self._candidates(), TOGETHER):
            hits = self._index.find([c.tidied for c in some], [text_of(c.rendered) for c in some])
            for candidate, hit in zip(some, hits, strict=True):
                row = self._row(candidate)
                if hit:
                    about = {"item": hit.item, "file": hit.file, "coverage": hit.coverage}
                    if hit.coverage >= self._settings.decontamination.coverage:
                        self._drop(row, f"{EVALUATION_REASON}{hit.file}", **about)
                        continue
                    self._apart[NEAR_MISSES].append({**row, **about})
                self.counts.kept += 1
                self._keys.append(exact_key(self._source.stage, text_of(candidate.rendered)))
                self._ranks.append(rank_of(self._task.source, candidate.id))
                yield row

    def _candidates(self) -> Iterator[Candidate]:
        for record in self._records():
            self.counts.records += 1
            id_ = stable_id(self._source.name, record)
            tidied, rules = self._cleaner.tidy(record)
            if rules:
                self.counts.changed.update(rules)
                about = {"id": id_, "source": self._source.name, "place": record.id, "rules": rules}
                self._apart[CHANGED].append({**about, "before": _plain(record), "after": _plain(tidied)})
            reason = "not drawn" if draw(id_) >= self._source.share else None
            try:
                reason = reason or self._cleaner.objection(tidied)
                rendered = render(tidied, self._source.stage)
                if rendered is not tidied:  # else it has been judged
                    reason = reason or self._cleaner.objection(rendered)
            except UnusableRow as error:
                reason = reason or str(error)
            if reason:
                row = {"id": id_, "source": self._source.name, "place": record.id, **_plain(record)}
                self._drop(row, reason)
            else:
                yield Candidate(id_, record.id, tidied, rendered)

    def _records(self) -> Iterator[AnyRecord]:
        """The records of this task; rows that give none are counted and skipped."""
        task = self._task
        for number, (rows, record) in enumerate(islice(read_raw(self._source, task.file), self._source.limit)):
            if number % task.stripes != task.stripe:
                continue
            self.counts.rows += rows
            if isinstance(record, Skipped):
                self.counts.skipped[record.reason] += rows
                self._apart[SKIPPED].append({"source": self._source.name, "place": record.id, "reason": record.reason,
                                               "raw": record.raw})  # fmt: skip
                continue
            self.counts.used += rows
            yield record

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        row = {**to_row(candidate.rendered), "source": self._source.name, "place": candidate.place}
        return row | {"id": candidate.id}

    def _drop(self, row: dict[str, Any], reason: str, **about: Any) -> None:
        self.counts.dropped[reason] += 1
        self._apart[SKIPPED].append({"reason": reason, **about, **row})


def _plain(record: AnyRecord) -> dict[str, Any]:
    """A record's contents as JSON has them."""
    return {key: value for key, value in asdict(record).items() if key != "id"}
