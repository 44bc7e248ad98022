"""Clean, deduplicated shards -> the files of the three training sets, and what was counted on the way."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from qilin_med.artifact import written_whole
from qilin_med.config.corpus import CorpusSettings
from qilin_med.config.experiment import StageName
from qilin_med.data.clean import Cleaner
from qilin_med.data.deduplicate import Workspace, cut_out, cuts_of_shard, duplicates_of_shard
from qilin_med.data.intake import CHANGED, SKIPPED, Summed, draw
from qilin_med.data.render import from_row, text_of
from qilin_med.data.shards import chunks, read_lines, save_json, write_lines
from qilin_med.records import Chat, Document

COUNTED_AT_ONCE = 1000  # records tokenised together
REPEATS = "nothing left without the passages that other documents have"
CUT = "passages that other documents have"
TEXT, TURNS = pa.string(), pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
SCHEMAS: dict[StageName, pa.Schema] = {
    stage: pa.schema([("id", TEXT), *columns, ("source", TEXT), ("place", TEXT)])
    for stage, columns in {
        "pretraining": [("text", TEXT)],
        "sft": [("conversations", TURNS)],
        "dpo": [
            *((name, TEXT) for name in ("question", "response_chosen", "response_rejected")),
            *(("conversations", TURNS), ("chosen", TEXT), ("rejected", TEXT)),
        ],
    }.items()
}
"""Columns of parquet files; a preference pair fills the first three of its own or the last three."""


@dataclass(slots=True)
class Written(Summed):
    """What one shard gave: before = train + dev + sum(dropped)."""

    before: int = 0
    dropped: Counter = field(default_factory=Counter)
    """Duplicates, by kind."""
    cut: int = 0
    """Documents that lost a passage to another one."""
    train: int = 0
    dev: int = 0
    tokens: int = 0
    """Tokens of all texts written, by the corpus file's tokenizer, without template."""
    bytes: int = 0
    """UTF-8 bytes of all texts written."""
    several_turns: int = 0
    """Conversations of more than one question."""

    def check(self) -> None:
        assert self.before == self.train + self.dev + self.dropped.total(), self


def write_shard(work: Workspace, settings: CorpusSettings, tokenizer_file: Path, shard: int) -> None:
    """Task: train and dev files of one shard; what duplicates others is appended to what was skipped."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    written, apart, changed = Written(), [], []
    with SplitFiles(work, settings, shard) as files:
        for rows in chunks(_left_rows(work, settings, shard, written, apart, changed), COUNTED_AT_ONCE):
            _count(written, rows, work.stages[shard], tokenizer)
            for split, chosen in _split(rows, settings.dev_share).items():
                setattr(written, split, getattr(written, split) + len(chosen))
                files.write(split, chosen)
    written.check()
    for name, rows in ((SKIPPED, apart), (CHANGED, changed)):
        path = work.root / "out" / name / f"{work.stages[shard]}-{work.index_in_stage(shard):05d}.jsonl"
        write_lines(path, [*read_lines(work.path(name, shard, "jsonl")), *rows])
    save_json(work.path("written", shard, "json"), written.as_json())


def _left_rows(
    work: Workspace, settings: CorpusSettings, shard: int, written: Written, apart: list[Any], changed: list[Any]
) -> Iterator[dict[str, Any]]:
    """The rows of a shard that no other record stands for, without passages that other documents have."""
    duplicates = duplicates_of_shard(work, settings.deduplication, shard)
    width = settings.deduplication.substring_tokens
    cuts = cuts_of_shard(work, width, shard) if width and work.stages[shard] == "pretraining" else {}
    cleaner, shards = Cleaner(settings.cleaning), work.shards
    for index, row in enumerate(shards.rows(shard)):
        written.before += 1
        if index in duplicates:
            reason, kept, similarity = duplicates[index]
            written.dropped[reason] += 1
            about = {"reason": reason, "kept": shards.row(kept)["id"], "similarity": round(similarity, 4)}
            apart.append({**about, **row})
            continue
        if index in cuts:
            text = cut_out(row["text"], cuts[index])
            if cleaner.objection(Document(row["id"], text)):
                written.dropped[REPEATS] += 1
                apart.append({"reason": REPEATS, **row})
                continue
            written.cut += 1
            about = {name: row[name] for name in ("id", "source", "place")}
            changed.append({**about, "rules": [CUT], "before": {"text": row["text"]}, "after": {"text": text}})
            row = {**row, "text": text}
        yield row
    shards.close()


def _count(written: Written, rows: list[dict[str, Any]], stage: StageName, tokenizer: Any) -> None:
    records = [from_row(stage, row) for row in rows]
    texts = [text_of(record) for record in records]
    written.bytes += sum(len(text.encode()) for text in texts)
    written.tokens += sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    written.several_turns += sum(_has_several_turns(record) for record in records)


def _split(rows: list[dict[str, Any]], dev_share: float) -> dict[str, list[dict[str, Any]]]:
    """Rows by the side that their contents put them on, whatever else is in the corpus."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    for row in rows:
        splits["dev" if draw(row["id"]) < dev_share else "train"].append(row)
    return splits


def _has_several_turns(record: Any) -> bool:
    return isinstance(record, Chat) and sum(message.role == "user" for message in record.messages) > 1


class SplitFiles:
    """<stage>/<split>-<number>.jsonl or .parquet, opened at a split's first row: one that gets none has no file."""

    def __init__(self, work: Workspace, settings: CorpusSettings, shard: int):
        self._folder, self._number = work.root / "out" / work.stages[shard], work.index_in_stage(shard)
        self._schema = SCHEMAS[work.stages[shard]]
        self._format = settings.format
        self._files = ExitStack()
        self._writers: dict[str, Any] = {}

    def __enter__(self) -> "SplitFiles":
        self._files.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    def write(self, split: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        if split not in self._writers:
            path = self._folder / f"{split}-{self._number:05d}.{self._format}"
            file = self._files.enter_context(written_whole(path))
            if self._format == "parquet":
                file = self._files.enter_context(pq.ParquetWriter(file, self._schema))
            self._writers[split] = file
        if self._format == "parquet":
            self._writers[split].write_table(pa.Table.from_pylist(rows, self._schema))
        else:
            self._writers[split].write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of a set."""
    if file.suffix != ".parquet":
        yield from read_lines(file)
        return
    for batch in pq.ParquetFile(file).iter_batches():
        yield from ({name: value for name, value in row.items() if value is not None} for row in batch.to_pylist())
