"""The first records of data files, made into training rows as a stage makes them: can they be used, are they cut, and how
much does the whole data hold.

Amounts of a file that is longer than its head are estimated from its bytes (parquet: from its rows).
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from qilin_med.check.findings import Findings
from qilin_med.config.experiment import DataSource, PretrainingConfig, StageConfig, StageName
from qilin_med.data.read.files import content_suffix, share_of_lines
from qilin_med.data.read.readers import find_files, read_training_file
from qilin_med.data.rows import ENCODERS, KINDS, Counts, counted_blocks
from qilin_med.plan.data import Amount
from qilin_med.prompt.template import ChatTemplate
from qilin_med.records import Document, Skipped

FILE_RECORDS, FEWEST_RECORDS = 1_000, 20  # of one file; fewer of each where there are many, never fewer than the second
STAGE_RECORDS = 20_000
FILE_CHARACTERS = 4_000_000  # where records are whole books
LINE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
MOST_UNUSABLE = 0.1  # share of a file's looked-at records above which its format is taken for wrong


class Model(NamedTuple):
    """A model folder that data and settings are checked with."""

    folder: Path
    without_weights: Any
    """The model on the meta device."""
    tokenizer: Any
    positions: int | None


@dataclass
class RowCounts(Counts):
    """Counts that tell the newest row's own length, and whether a text of it was cut."""

    newest: tuple[int, bool] = (0, False)

    def add_row(self, tokens: int, trained: int, longest: int, encoded: Any = None) -> None:
        super().add_row(tokens, trained, longest, encoded)
        self.newest = longest, bool(encoded and (encoded.cut_sources or encoded.cut_targets))


class Head:
    """The first records of a file, at most so many, which the encoders of training rows read in place of all of them."""

    def __init__(self, stage: StageName, file: Path, source: DataSource, most: int) -> None:
        self.file, self.counts = file, RowCounts()
        self.lengths: dict[str, int] = {}
        """Tokens of the longest run of positions that a record became part of, by its id."""
        self.cut: set[str] = set()
        """Ids of the records that lost text."""
        records, found, characters = read_training_file(KINDS[stage], file, source), [], 0
        while len(found) < most and characters < FILE_CHARACTERS and (record := next(records, None)):
            characters += len(record.text) if isinstance(record, Document) else 0
            found.append(record)
        self.looked_at, self.share = len(found), 1.0
        """The part of the file that they are."""
        self.unusable = [record for record in found if isinstance(record, Skipped)]
        self._usable = [record for record in found if not isinstance(record, Skipped)]
        if found and next(records, None):
            self.share = self._share(found[-1].id, records)

    def _share(self, last: str, others: Iterator[Any]) -> float:
        share, (place, _, line) = 1.0, last.rpartition(":")
        if self.file.suffix.lower() == ".parquet":
            share = self.looked_at / pyarrow.parquet.ParquetFile(self.file).metadata.num_rows
        elif place == str(self.file) and content_suffix(self.file.name) in LINE_SUFFIXES:
            share = share_of_lines(self.file, int(line))
        # Arrays, books of tables, archives and small packed files are read to their end.
        return share if share < 1 else self.looked_at / (self.looked_at + 1 + sum(1 for _ in others))

    def measure(self, stage: StageName, section: StageConfig, tokenizer: Any) -> None:
        """Make rows of the usable records and count them."""
        rows = self._rows(ENCODERS[stage](section, tokenizer)(self._usable, self.counts))
        if stage == "pretraining":
            documents = ((row["ids"][0], np.array(row["input_ids"])) for row in rows)
            rows = counted_blocks(documents, section, self.counts)
        for row in rows:
            longest, is_cut = self.counts.newest
            self.lengths |= {id_: max(longest, self.lengths.get(id_, 0)) for id_ in row["ids"]}
            self.cut.update(row["ids"] if is_cut else ())

    def _rows(self, encoded: Iterator[Any]) -> Iterator[Any]:
        for row in encoded:
            if isinstance(row, Skipped):
                self.unusable.append(row)
            else:
                yield row


class Data:
    """What the heads of all files say about a set of data."""

    def __init__(self, heads: list[Head]):
        self.heads = heads
        self.looked_at = sum(head.looked_at for head in heads)
        self.records = sum(round(head.looked_at / head.share) for head in heads)
        self.is_whole = all(head.share == 1 for head in heads)
        self.unusable = [record for head in heads for record in head.unusable]
        self.lengths = [length for head in heads for length in head.lengths.values()]
        self.cut = sum(len(head.cut) for head in heads)

    def amount(self, section: StageConfig) -> Amount | None:
        """Of all files; None if no record can be used."""
        if not self.lengths:
            return None
        rows, tokens, trained = (
            sum(getattr(head.counts, name) / head.share for head in self.heads)
            for name in ("rows", "tokens", "trained_tokens")
        )
        if isinstance(section, PretrainingConfig):  # blocks go on from file to file
            rows = tokens / section.block_size
        source = "all records" if self.is_whole else f"estimated from {self.looked_at:,} records"
        return Amount(math.ceil(rows - 1e-6), round(tokens), round(trained), max(self.lengths), source)

    def cells(self) -> list[str]:
        """Records (marked where estimated), and the shares of those looked at that are unusable or cut."""
        if not self.looked_at:
            return ["-", "-", "-"]
        shares = [len(self.unusable) / self.looked_at, self.cut / self.looked_at]
        unusable, cut = (f"{share:.1%}" for share in shares)
        return [f"{'' if self.is_whole else '~'}{short_number(self.records)}", unusable, cut if self.lengths else "-"]


def short_number(value: float) -> str:
    """At most nine characters."""
    for least, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e7, 1e6, "M")):
        if value >= least:
            return f"{value / size:,.2f}{unit}"
    return f"{value:,.0f}"


def check_data(
    findings: Findings, key: str, stage: StageName, sources: list[DataSource], section: StageConfig | None = None,
    model: Model | None = None,
) -> Data:  # fmt: skip
    """The heads of a setting's files (`key`, as problems name it), read as the stage reads them, and measured as the rows
    that its section makes of them."""
    files, heads = [], []
    for source in sources:
        if not findings.is_awaited(source.path):
            with findings.collecting(key):
                files += find_files([source])
    can_measure = bool(section and model)
    if can_measure and stage != "pretraining":
        can_measure = False
        with findings.collecting(str(model.folder)):
            # UserError: there is no template, or it does not write a question and its answer.
            can_measure = ChatTemplate(model.tokenizer).end_id is not None
    most = max(FEWEST_RECORDS, min(FILE_RECORDS, STAGE_RECORDS // max(len(files), 1)))
    for file, source in files:
        with findings.collecting(key):
            heads.append(Head(stage, file, source, most))
            if can_measure:
                heads[-1].measure(stage, section, model.tokenizer)
    data = Data(heads)
    judge_format(findings, key, data)
    if section and model and model.positions:
        judge_lengths(findings, key, section, data, model.positions)
    return data


def judge_format(findings: Findings, key: str, data: Data) -> None:
    """A problem where a file's records are mostly of another format, a note where some cannot be used."""

    def reasons(records: list[Skipped]) -> str:
        counts = Counter(record.reason for record in records).most_common(3)
        first = next(record for record in records if record.reason == counts[0][0])
        return "; ".join(f"{count} x {reason}" for reason, count in counts) + f"; the first: {first.id}"

    wrong = [head for head in data.heads if len(head.unusable) > MOST_UNUSABLE * head.looked_at]
    if wrong:
        more = f"; {len(wrong) - 1} more files are alike" if len(wrong) > 1 else ""
        findings.problem(
            f"{key}: {len(wrong[0].unusable):,} of the first {wrong[0].looked_at:,} records of {wrong[0].file} cannot be"
            f" used ({reasons(wrong[0].unusable)}){more}; mend or remove them (formats: data/README.md)"
        )
    elif data.unusable:
        findings.note(f"{key}: {len(data.unusable):,} of {data.looked_at:,} records looked at cannot be used"
                      f" ({reasons(data.unusable)})")  # fmt: skip
    for head in data.heads:
        if not head.looked_at:
            findings.problem(f"{key}: {head.file} holds blank lines only; fill it or take it out")


def judge_lengths(findings: Findings, key: str, section: StageConfig, data: Data, positions: int) -> None:
    """A problem where rows are longer than the model's positions, a note where rows not looked at may be."""
    if isinstance(section, PretrainingConfig):
        most, limits = section.block_size, "block_size"
    else:
        most, limits = section.max_source_length + section.max_target_length, "max_source_length or max_target_length"
    if too_long := sum(length > positions for length in data.lengths):
        findings.problem(
            f"{key}: {too_long:,} of {len(data.lengths):,} records looked at give rows of up to {max(data.lengths):,} tokens,"
            f" the model has {positions:,} positions: lower {limits}"
        )
    elif most > positions and not data.is_whole:
        findings.note(f"{key}: rows may have {most:,} tokens, the model has {positions:,} positions; none of the records"
                      f" looked at is too long, but if one is, the stage is refused: lower {limits}")  # fmt: skip
