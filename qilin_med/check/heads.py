"""The first records of data files: can they be used, are they cut, and how much does the whole data hold.

Amounts of a file that is longer than its head are estimated from its bytes (parquet: from its rows).
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from qilin_med.check.findings import Findings
from qilin_med.config.experiment import DataSource, DpoConfig, PretrainingConfig, StageConfig, StageName
from qilin_med.data.read.files import content_suffix, share_of_lines
from qilin_med.data.read.readers import find_files
from qilin_med.data.rows import READERS
from qilin_med.plan.data import Amount
from qilin_med.prompt.template import IGNORED, ChatTemplate, EncodedPreference, control_ids, encode_texts
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


class Measure(NamedTuple):
    """One record as training rows; of a document, `rows` is a share of a block."""

    rows: float
    tokens: int
    trained: int
    longest: int
    """Tokens of its longest run of positions."""
    is_cut: bool


@dataclass
class Head:
    """First records of a file. `share`: the part of the file that they are. Those that are usable are measured where the
    stage has what encodes them."""

    file: Path
    looked_at: int
    share: float
    unusable: list[Skipped]
    measures: list[Measure] = field(default_factory=list)


class Data:
    """What the heads of all files say about a set of data."""

    def __init__(self, heads: list[Head]):
        self.heads = heads
        self.looked_at = sum(head.looked_at for head in heads)
        self.records = sum(round(head.looked_at / head.share) for head in heads)
        self.is_whole = all(head.share == 1 for head in heads)
        self.unusable = [record for head in heads for record in head.unusable]
        self.measures = [measure for head in heads for measure in head.measures]
        self.longest = max((measure.longest for measure in self.measures), default=0)

    def amount(self) -> Amount | None:
        """Of all files; None if no record can be used."""
        if not self.measures:
            return None
        rows, tokens, trained = (
            sum(getattr(measure, name) / head.share for head in self.heads for measure in head.measures)
            for name in ("rows", "tokens", "trained")
        )
        source = "all records" if self.is_whole else f"estimated from {self.looked_at:,} records"
        return Amount(math.ceil(rows - 1e-6), round(tokens), round(trained), self.longest, source)


def check_data(
    findings: Findings, key: str, stage: StageName, sources: list[DataSource], section: StageConfig | None = None,
    model: Model | None = None,
) -> Data:  # fmt: skip
    """The heads of a setting's files (`key`, as problems name it), read as the stage reads them, and measured as the rows
    that its section makes of them."""
    files = []
    for source in sources:
        if not findings.is_awaited(source.path):
            with findings.collecting(key):
                files += find_files([source])
    template = None
    if model and section and stage != "pretraining":
        with findings.collecting(str(model.folder)):
            template = ChatTemplate(model.tokenizer)
            assert template.end_id is not None  # UserError: the template does not write a question and its answer
    most = max(FEWEST_RECORDS, min(FILE_RECORDS, STAGE_RECORDS // max(len(files), 1)))
    heads = []
    for file, source in files:
        with findings.collecting(key):
            head, usable = read_head(stage, file, source, most)
            heads.append(head)
            if section and (template or (model and stage == "pretraining")):
                results = list(measure_records(section, model.tokenizer, template, usable, head.share))
                head.unusable += [result for result in results if isinstance(result, Skipped)]
                head.measures = [result for result in results if isinstance(result, Measure)]
    data = Data(heads)
    judge_format(findings, key, data)
    if section and model and model.positions:
        judge_lengths(findings, key, section, data, model.positions)
    return data


def read_head(stage: StageName, file: Path, source: DataSource, most: int) -> tuple[Head, list[Any]]:
    """At most so many records, and those of them that can be used."""
    records, found, characters = READERS[stage]([DataSource(path=str(file), text=source.text)]), [], 0
    while len(found) < most and characters < FILE_CHARACTERS and (record := next(records, None)):
        characters += len(record.text) if isinstance(record, Document) else 0
        found.append(record)
    share = 1.0
    if found and next(records, None):
        place, _, line = found[-1].id.rpartition(":")
        if file.suffix.lower() == ".parquet":
            share = len(found) / pyarrow.parquet.ParquetFile(file).metadata.num_rows
        elif place == str(file) and content_suffix(file.name) in LINE_SUFFIXES:
            share = share_of_lines(file, int(line))
        if share == 1:  # arrays, books of tables, archives, small packed files
            share = len(found) / (len(found) + 1 + sum(1 for _ in records))
    unusable = [record for record in found if isinstance(record, Skipped)]
    return Head(file, len(found), share, unusable), [record for record in found if not isinstance(record, Skipped)]


def measure_records(
    section: StageConfig, tokenizer: Any, template: ChatTemplate | None, records: list[Any], share: float
) -> Iterator[Measure | Skipped]:
    if isinstance(section, PretrainingConfig):
        controls, texts = control_ids(tokenizer), encode_texts(tokenizer, [document.text for document in records])
        joined = round(sum(len(ids) + 1 for ids in texts) / share)  # tokens of the whole file
        for document, ids in zip(records, texts, strict=True):
            if not ids or not controls.isdisjoint(ids):
                yield Skipped(document.id, "contains a role mark" if ids else "empty text", "")
                continue
            tokens = len(ids) + 1  # with EOS
            longest = min(section.block_size, tokens if section.isolate_documents else joined)
            yield Measure(tokens / section.block_size, tokens, len(ids), longest, False)
        return
    encode = template.encode_preferences if isinstance(section, DpoConfig) else template.encode_chats
    for row in encode(records, section.max_source_length, section.max_target_length):
        if isinstance(row, Skipped):
            yield row
        elif isinstance(row, EncodedPreference):
            prompt, answers = len(row.prompt_ids), (len(row.chosen_ids), len(row.rejected_ids))
            is_cut = bool(row.cut_sources or row.cut_targets)
            yield Measure(1, prompt + sum(answers), sum(answers), prompt + max(answers), is_cut)
        else:  # the rows of one conversation
            lengths = [len(part.input_ids) for part in row]
            trained = sum(lengths) - sum(part.labels.count(IGNORED) for part in row)
            is_cut = any(part.cut_sources or part.cut_targets for part in row)
            yield Measure(len(row), sum(lengths), trained, max(lengths), is_cut)


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
    if too_long := sum(measure.longest > positions for measure in data.measures):
        findings.problem(
            f"{key}: {too_long:,} of {len(data.measures):,} records looked at give rows of up to {data.longest:,} tokens,"
            f" the model has {positions:,} positions: lower {limits}"
        )
    elif most > positions and not data.is_whole:
        findings.note(f"{key}: rows may have {most:,} tokens, the model has {positions:,} positions; none of the records"
                      f" looked at is too long, but if one is, the stage is refused: lower {limits}")  # fmt: skip
