"""The two ends of a build: raw files -> clean shards, and what deduplication left of these -> the files of the sets.

Counts add up over tasks (see `qilin_med.data.card`). No row vanishes: one that gives no record is skipped; a record that
a rule, an evaluation question or a better copy keeps out is rejected; both are written apart with the reason.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from qilin_med.artifact import written_whole
from qilin_med.config.corpus import CorpusSettings, RawSource
from qilin_med.config.experiment import StageName
from qilin_med.data import deduplicate as deduplication
from qilin_med.data.clean import Cleaner
from qilin_med.data.decontaminate import Index
from qilin_med.data.questions import question_in
from qilin_med.data.read.files import Span
from qilin_med.data.read.formats.reading import UnusableRow
from qilin_med.data.read.readers import READERS, read_raw
from qilin_med.data.read.spans import cut_file
from qilin_med.data.render import from_row, is_whole, render, stable_id, text_of, to_row
from qilin_med.data.shards import Row, Workspace, batched, read_json_lines, save_json, write_json_lines
from qilin_med.records import AnyRecord, Chat, Document, Question, Skipped, TrainingRecord

SEARCHED_AT_ONCE = 500  # records looked up in the index of evaluation questions
COUNTED_AT_ONCE = 1000  # records tokenised together
HASH_BITS = 56  # of a rank; the source's place in the corpus file takes the others
EVALUATION_REASON = "repeats a question of "
REPEATS = "nothing left without the passages that other documents have"
CUT = "passages that other documents have"
APART = ("skipped", "rejected", "changed")
"""Folders of a build beside the sets."""

TEXT, TURNS = pa.string(), pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
ANSWERS = [(name, TEXT) for name in ("question", "response_chosen", "response_rejected")]
SCHEMAS: dict[StageName, pa.Schema] = {
    stage: pa.schema([("id", TEXT), *columns, ("source", TEXT), ("place", TEXT)])
    for stage, columns in {
        "pretraining": [("text", TEXT)],
        "sft": [("conversations", TURNS)],
        "dpo": [*ANSWERS, ("conversations", TURNS), ("chosen", TEXT), ("rejected", TEXT)],
    }.items()
}
"""Columns of parquet files; a preference pair fills the first three of its own or the last three."""


@dataclass(frozen=True, slots=True)
class Task:
    """A file of a source, or one of several stripes of it. Stripes of a file that can be cut are read each by itself; of
    any other, the task of the first stripe reads the whole file and fills the shards of all."""

    source: int
    file: Path
    stripe: int = 0
    stripes: int = 1
    is_cut: bool = False


@dataclass
class Account:
    """What a task counted, by kind and reason, and the rows that it keeps apart."""

    counts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    apart: defaultdict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))

    def reject(self, reason: str, row: Row, kind: str = "rejected", **about: Any) -> None:
        self.counts[kind][reason] += 1
        self.apart["rejected"].append({"reason": reason, **about, **row})


def hash_of(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=HASH_BITS // 8).digest())


def draw(id_: str) -> float:
    """A number in [0, 1) from a record's contents, the same in every build: it decides shares and splits."""
    return hash_of(id_) / 2**HASH_BITS


def rank_of(source: int, id_: str) -> int:
    return source << HASH_BITS | hash_of(id_)


# --------------------------------------------------------------------------------------------- raw files -> shards

load_index = lru_cache(maxsize=1)(Index)  # a worker has many tasks


def clean_shard(work: Workspace, settings: CorpusSettings, tasks: tuple[Task, ...], shard: int) -> None:
    """Task: the shard of a task's clean records, without evaluation questions, and beside it what it kept apart."""
    task, account = tasks[shard], Account()
    if task.stripe and not task.is_cut:
        return
    stage, kept_out = settings.sources[task.source].stage, settings.decontamination
    index = load_index(work.root / "evaluation", kept_out.ngram, kept_out.near_miss)
    keys: list[bytes] = []
    ranks: list[int] = []

    def rows() -> Iterator[Row]:
        for some in batched(read_clean(settings, task, span_of(work, task, shard), account), SEARCHED_AT_ONCE):
            texts = [text_of(rendered) for _, _, rendered in some]
            hits = index.find([cleaned for _, cleaned, _ in some])
            for (about, _, rendered), text, hit in zip(some, texts, hits, strict=True):
                row = {**to_row(rendered), **about}
                if hit and hit.same:
                    account.reject(f"{EVALUATION_REASON}{hit.file}", row, evaluation=asdict(hit))
                    continue
                if hit:
                    account.apart["near_misses"].append({**row, "evaluation": asdict(hit)})
                account.counts["records"]["kept"] += 1
                keys.append(deduplication.exact_key(stage, text))
                ranks.append(rank_of(task.source, about["id"]))
                yield row

    left, last = rows(), shard if task.is_cut else shard + task.stripes - 1
    for number in range(shard, last + 1):
        work.write(number, left, ranks, math.inf if number == last else settings.shard_megabytes * 2**20)
        deduplication.save_exact_keys(work, number, keys)
        for name in (*APART, "near_misses"):
            write_json_lines(work.path(name, number, "jsonl"), account.apart[name])
        save_json(work.path("clean", number, "counts.json"), account.counts)
        for counted in (keys, ranks, account.counts, account.apart):
            counted.clear()


def cut(work: Workspace, settings: CorpusSettings, tasks: tuple[Task, ...], shard: int) -> None:
    """Task: the spans of a file that is cut; `shard` is that of its first stripe."""
    task = tasks[shard]
    source = settings.sources[task.source]
    spans = cut_file(task.file, READERS[source.kind], source, task.stripes)
    save_json(work.path("spans", shard, "json"), [asdict(span) for span in spans])


def span_of(work: Workspace, task: Task, shard: int) -> Span | None:
    if not task.is_cut:
        return None
    spans = orjson.loads(work.path("spans", shard - task.stripe, "json").read_bytes())
    return Span(**spans[task.stripe])


def read_clean(
    settings: CorpusSettings, task: Task, span: Span | None, account: Account
) -> Iterator[tuple[Row, AnyRecord, TrainingRecord]]:
    """(id, source and place; the record cleaned; as its stage trains on it) of every record that no rule rejects."""
    source = settings.sources[task.source]
    cleaner = Cleaner(settings.cleaning_of(source))
    for rows, record in islice(read_raw(source, task.file, span), source.limit):
        account.counts["rows"]["read"] += rows
        if isinstance(record, Skipped):
            account.counts["skipped"][record.reason] += rows
            skipped = {"source": source.name, "place": record.id, "reason": record.reason, "raw": record.raw}
            account.apart["skipped"].append(skipped)
            continue
        account.counts["rows"]["used"] += rows
        account.counts["records"]["read"] += 1
        about = {"id": stable_id(source.name, record), "source": source.name, "place": record.id}
        cleaned, rules = cleaner.clean(record)
        if rules:
            account.counts["changed"].update(rules)
            texts = {"before": _contents(record), "after": _contents(cleaned)}
            account.apart["changed"].append({**about, "rules": rules, **texts})
        reason = "not drawn" if draw(about["id"]) >= source.share else cleaner.reject_reason(cleaned)
        try:
            rendered = render(cleaned, source.stage)
            if rendered is not cleaned:  # else it has been judged
                reason = reason or cleaner.reject_reason(rendered)
            if isinstance(cleaned, Question) and not is_whole(text_of(rendered)):
                reason = reason or "cleaning left no whole question"
        except UnusableRow as error:
            reason = reason or str(error)
        if reason:
            account.reject(reason, {**about, **_contents(record)})
        else:
            yield about, cleaned, rendered


def _contents(record: AnyRecord) -> Row:
    return {key: value for key, value in asdict(record).items() if key != "id"}


# ------------------------------------------------------------------------------------------------- shards -> sets


def write_shard(work: Workspace, settings: CorpusSettings, tasks: tuple[Task, ...], shard: int) -> None:
    """Task: train and dev files of one shard; what duplicates others is appended to what was rejected."""
    tokenizer = deduplication.load_tokenizer(settings.tokenizer)
    stage, out = work.stages[shard], work.root / "out"
    number = work.stages[:shard].count(stage)
    account, source = Account(), settings.sources[tasks[shard].source]
    with ExitStack() as files:

        @cache
        def writer(split: str) -> Callable[[list[bytes], list[Row]], Any]:
            """Opened at a split's first row: one that gets none has no file."""
            file = files.enter_context(written_whole(out / stage / f"{split}-{number:05d}.{settings.format}"))
            if settings.format == "jsonl":
                return lambda lines, rows: file.writelines(lines)
            table = files.enter_context(pq.ParquetWriter(file, SCHEMAS[stage]))
            return lambda lines, rows: table.write_table(pa.Table.from_pylist(rows, SCHEMAS[stage]))

        for left in batched(rows_left(work, settings, source, tokenizer, shard, account), COUNTED_AT_ONCE):
            records = [from_row(stage, row) for _, row, _ in left]
            texts = [text_of(record) for record in records]
            assert source.kind != "exam" or all(map(is_whole, texts)), next(t for t in texts if not is_whole(t))
            uncounted = [text for text, (_, _, tokens) in zip(texts, left, strict=True) if tokens is None]
            encodings = tokenizer.encode_batch_fast(uncounted, add_special_tokens=False)
            account.counts["written"] += Counter(
                tokens=sum(tokens or 0 for _, _, tokens in left) + sum(len(encoding) for encoding in encodings),
                bytes=sum(len(text.encode()) for text in texts),
                several_turns=sum(
                    isinstance(record, Chat) and sum(message.role == "user" for message in record.messages) > 1
                    for record in records
                ),
            )
            # The split depends on a record's contents alone, not on what else is in the corpus.
            splits = ["dev" if draw(row["id"]) < settings.dev_share else "train" for _, row, _ in left]
            account.counts["written"].update(splits)
            for split in sorted(set(splits)):
                mine = [one for one, side in zip(left, splits, strict=True) if side == split]
                writer(split)([line for line, _, _ in mine], [row for _, row, _ in mine])
    for name in APART:
        rows = [*read_json_lines(work.path(name, shard, "jsonl")), *account.apart[name]]
        write_json_lines(out / name / f"{stage}-{number:05d}.jsonl", rows)
    save_json(work.path("written", shard, "counts.json"), account.counts)


def rows_left(
    work: Workspace, settings: CorpusSettings, source: RawSource, tokenizer: Tokenizer, shard: int, account: Account
) -> Iterator[tuple[bytes, Row, int | None]]:
    """The rows of a shard that no other record stands for, without passages that other documents have: (as a line of
    JSON, parsed, tokens if they have been counted)."""
    duplicates, repeats, lengths = deduplication.duplicates_of_shard(work, settings.deduplication, shard), {}, {}
    if (width := settings.deduplication.substring_tokens) and work.stages[shard] == "pretraining":
        if source.kind != "exam" and source.deduplication.substrings:
            repeats = deduplication.repeats_of_shard(work, shard)
        lengths = deduplication.lengths_of_shard(work, shard)
    cleaner = Cleaner(settings.cleaning_of(source))
    record = work.random_access()
    for index, line in enumerate(work.lines(shard)):
        row, tokens = orjson.loads(line), lengths.get(index)
        if index in duplicates:
            reason, kept, similarity = duplicates[index]
            account.reject(reason, row, "duplicates", kept=record(kept)["id"], similarity=round(similarity, 4))
            continue
        spans = []
        if index in repeats and not question_in(row["text"]):  # a question is whole or nothing
            offsets = tokenizer.encode(row["text"], add_special_tokens=False).offsets
            spans = deduplication.spans_of(
                repeats[index], width, source.deduplication.substring_tokens or width, offsets
            )
        if spans:
            text = deduplication.cut_out(row["text"], spans)
            if cleaner.reject_reason(Document(row["id"], text)):
                account.reject(REPEATS, row, "duplicates")
                continue
            account.counts["written"]["cut"] += 1
            about = {name: row[name] for name in ("id", "source", "place")}
            texts = {"before": {"text": row["text"]}, "after": {"text": text}}
            account.apart["changed"].append({**about, "rules": [CUT], **texts})
            row, tokens = {**row, "text": text}, None
            line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        yield line, row, tokens
