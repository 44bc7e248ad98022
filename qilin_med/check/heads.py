"""The first records of data files: can they be used, are they cut, and how much does the whole data hold.

Amounts of a file that is longer than its head are estimated from its bytes (parquet: from its rows).
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet

from qilin_med.check.findings import Findings
from qilin_med.config.experiment import DataSource, DpoConfig, PretrainingConfig, StageConfig, StageName
from qilin_med.data.read.files import content_suffix, share_of_lines
from qilin_med.data.read.records import find_files
from qilin_med.data.rows import READERS
from qilin_med.plan.data import Amount
from qilin_med.prompt.template import IGNORED, ChatTemplate, EncodedChat, EncodedPreference, control_ids, encode_texts
from qilin_med.records import Document, Skipped

FILE_RECORDS, FEWEST_RECORDS = 1_000, 20  # of one file; fewer of each where there are many, never fewer than the second
STAGE_RECORDS = 20_000
FILE_CHARACTERS = 4_000_000  # where records are whole books
LINE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
MOST_UNUSABLE = 0.1  # share of a file's looked-at records above which its format is taken for wrong


@dataclass(frozen=True)
class Head:
    """First records of a file. `share`: the part of the file that they are."""

    file: Path
    usable: list[Any]
    unusable: list[Skipped]
    share: float

    @property
    def looked_at(self) -> int:
        return len(self.usable) + len(self.unusable)

    @property
    def records(self) -> int:
        """Of the whole file."""
        return round(self.looked_at / self.share)


def read_heads(findings: Findings, key: str, stage: StageName, sources: list[DataSource]) -> list[Head]:
    """Heads of all files of a setting (`key`, as problems name it), read as the stage reads them."""
    files = []
    for source in sources:
        if not findings.is_awaited(source.path):
            with findings.collecting(key):
                files += find_files([source])
    most = max(FEWEST_RECORDS, min(FILE_RECORDS, STAGE_RECORDS // max(len(files), 1)))
    heads = []
    for file, source in files:
        with findings.collecting(key):
            heads.append(_read_head(stage, file, source, most))
    return heads


def _read_head(stage: StageName, file: Path, source: DataSource, most: int) -> Head:
    records = READERS[stage]([DataSource(path=str(file), text=source.text)])
    head = list(islice(_within_characters(records), most))
    share = _share(file, head, records) if head else 1.0
    usable = [record for record in head if not isinstance(record, Skipped)]
    return Head(file, usable, [record for record in head if isinstance(record, Skipped)], share)


def _within_characters(records: Iterator[Any]) -> Iterator[Any]:
    characters = 0
    while characters < FILE_CHARACTERS and (record := next(records, None)):
        characters += len(record.text) if isinstance(record, Document) else 0
        yield record


def _share(file: Path, head: list[Any], rest: Iterator[Any]) -> float:
    if next(rest, None) is None:
        return 1.0
    if file.suffix.lower() == ".parquet":
        return len(head) / pyarrow.parquet.ParquetFile(file).metadata.num_rows
    place, _, line = head[-1].id.rpartition(":")
    if place == str(file) and content_suffix(file.name) in LINE_SUFFIXES:
        share = share_of_lines(file, int(line))
        if share < 1:
            return share
    return len(head) / (len(head) + 1 + sum(1 for _ in rest))  # arrays, books of tables, archives, small packed files


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Measure:
    """One record as training rows; of a document, `rows` is a share of a block."""

    rows: float
    tokens: int
    trained: int
    longest: int
    """Tokens of its longest run of positions."""
    is_cut: bool


@dataclass(frozen=True)
class Encoded:
    """A head's records as a stage takes them."""

    head: Head
    measures: list[Measure]
    unusable: list[Skipped]


@dataclass(frozen=True)
class Data:
    """What the heads of all files say about a set of data."""

    files: list[Encoded]

    @cached_property
    def unusable(self) -> list[Skipped]:
        return [record for file in self.files for record in file.unusable]

    @property
    def looked_at(self) -> int:
        return sum(file.head.looked_at for file in self.files)

    @property
    def records(self) -> int:
        return sum(file.head.records for file in self.files)

    @property
    def is_whole(self) -> bool:
        return all(file.head.share == 1 for file in self.files)

    @cached_property
    def measures(self) -> list[Measure]:
        return [measure for file in self.files for measure in file.measures]

    @property
    def cut(self) -> int:
        return sum(measure.is_cut for measure in self.measures)

    @property
    def longest(self) -> int:
        return max((measure.longest for measure in self.measures), default=0)

    def amount(self) -> Amount | None:
        """Of all files; None if no record can be used."""
        if not self.measures:
            return None
        rows, tokens, trained = (
            sum(getattr(m, name) / file.head.share for file in self.files for m in file.measures)
            for name in ("rows", "tokens", "trained")
        )
        source = "all records" if self.is_whole else f"estimated from {self.looked_at:,} records"
        return Amount(math.ceil(rows - 1e-6), round(tokens), round(trained), self.longest, source)


def encode_heads(
    findings: Findings, key: str, section: StageConfig, tokenizer: Any, template: ChatTemplate | None, heads: list[Head]
) -> Data:
    """Heads as the stage's rows. Without what encodes them, or where it refuses them (a problem), as records alone."""
    encoder = tokenizer if isinstance(section, PretrainingConfig) else template
    if encoder:
        with findings.collecting(key):
            return Data([_encode_head(section, tokenizer, template, head) for head in heads])
    return Data([Encoded(head, [], head.unusable) for head in heads])


def _encode_head(section: StageConfig, tokenizer: Any, template: ChatTemplate | None, head: Head) -> Encoded:
    if isinstance(section, PretrainingConfig):
        results = list(_measured_documents(section, tokenizer, head))
    else:
        encode = template.encode_preferences if isinstance(section, DpoConfig) else template.encode_chats
        results = [
            result if isinstance(result, Skipped) else _measured(result)
            for result in encode(head.usable, section.max_source_length, section.max_target_length)
        ]
    further = [result for result in results if isinstance(result, Skipped)]
    return Encoded(head, [r for r in results if not isinstance(r, Skipped)], [*head.unusable, *further])


def _measured_documents(section: PretrainingConfig, tokenizer: Any, head: Head) -> Iterator[Measure | Skipped]:
    controls = control_ids(tokenizer)
    texts = encode_texts(tokenizer, [document.text for document in head.usable])
    joined = sum(len(ids) + 1 for ids in texts) / head.share  # tokens of the whole file
    for document, ids in zip(head.usable, texts, strict=True):
        if not ids or not controls.isdisjoint(ids):
            yield Skipped(document.id, "contains a role mark" if ids else "empty text", "")
            continue
        tokens = len(ids) + 1  # with EOS
        longest = min(section.block_size, tokens if section.isolate_documents else round(joined))
        yield Measure(tokens / section.block_size, tokens, len(ids), longest, False)


def _measured(encoded: list[EncodedChat] | EncodedPreference) -> Measure:
    if isinstance(encoded, EncodedPreference):
        prompt, answers = len(encoded.prompt_ids), (len(encoded.chosen_ids), len(encoded.rejected_ids))
        is_cut = bool(encoded.cut_sources or encoded.cut_targets)
        return Measure(1, prompt + sum(answers), sum(answers), prompt + max(answers), is_cut)
    lengths = [len(row.input_ids) for row in encoded]
    trained = sum(lengths) - sum(row.labels.count(IGNORED) for row in encoded)
    is_cut = any(row.cut_sources or row.cut_targets for row in encoded)
    return Measure(len(lengths), sum(lengths), trained, max(lengths), is_cut)


# ------------------------------------------------------------------------------------------------------ judgements


def judge_format(findings: Findings, key: str, data: Data) -> None:
    """A problem where a file's records are mostly of another format, a note where some cannot be used."""
    wrong = [file for file in data.files if len(file.unusable) > MOST_UNUSABLE * file.head.looked_at]
    if wrong:
        first = wrong[0]
        more = f"; {len(wrong) - 1} more files are alike" if len(wrong) > 1 else ""
        findings.problem(
            f"{key}: {len(first.unusable):,} of the first {first.head.looked_at:,} records of {first.head.file} cannot be"
            f" used ({_reasons(first.unusable)}){more}; mend or remove them (formats: data/README.md)"
        )
    elif data.unusable:
        findings.note(f"{key}: {len(data.unusable):,} of {data.looked_at:,} records looked at cannot be used"
                      f" ({_reasons(data.unusable)})")  # fmt: skip
    for file in data.files:
        if not file.head.looked_at:
            findings.problem(f"{key}: {file.head.file} holds blank lines only; fill it or take it out")


def _reasons(records: list[Skipped]) -> str:
    counts = Counter(record.reason for record in records).most_common(3)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts)
    first = next(record for record in records if record.reason == counts[0][0])
    return f"{reasons}; the first: {first.id}"


def judge_lengths(findings: Findings, key: str, section: StageConfig, data: Data, positions: int | None) -> None:
    """A problem where rows are longer than the model's positions, a note where rows not looked at may be."""
    if isinstance(section, PretrainingConfig):
        most, limits = section.block_size, "block_size"
    else:
        most, limits = section.max_source_length + section.max_target_length, "max_source_length or max_target_length"
    if not positions or most <= positions:
        return
    if too_long := sum(measure.longest > positions for measure in data.measures):
        findings.problem(
            f"{key}: {too_long:,} of {len(data.measures):,} records looked at give rows of up to {data.longest:,} tokens,"
            f" the model has {positions:,} positions: lower {limits}"
        )
    elif not data.is_whole:
        findings.note(f"{key}: rows may have {most:,} tokens, the model has {positions:,} positions; none of the records"
                      f" looked at is too long, but if one is, the stage is refused: lower {limits}")  # fmt: skip
