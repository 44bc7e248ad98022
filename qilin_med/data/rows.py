"""Records -> cached training rows: tokenised once, by all cores, before any rank starts.

The columns of a stage's rows (lists of int32 unless said otherwise):

- pretraining: `ids` (texts: the records that the row holds parts of), `input_ids`, `lengths` (tokens of each segment)
- sft: `ids` (one), `input_ids`, `labels` (-100 where nothing is learnt, unshifted)
- dpo: `ids` (one), `prompt_ids`, `chosen_ids`, `rejected_ids`

A cache folder is an artifact: rows.arrow, skipped.jsonl and MANIFEST.json (sizes, sha256, inputs, counts).
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qilin_med.artifact import Artifact, hash_files, read_manifest
from qilin_med.config.experiment import (
    DataSource,
    DpoConfig,
    InstructionConfig,
    Kind,
    PretrainingConfig,
    StageConfig,
    StageName,
)
from qilin_med.console.progress import progress
from qilin_med.data.processes import in_order
from qilin_med.data.read.files import Span, content_suffix, unpacked_size
from qilin_med.data.read.readers import find_files, read_training_file
from qilin_med.data.read.spans import cut_training_file
from qilin_med.data.shards import batched
from qilin_med.errors import UserError
from qilin_med.prompt.template import IGNORED, ChatTemplate, control_ids, encode_texts
from qilin_med.records import RAW_CHARACTERS, Chat, Document, Preference, Skipped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

ROW_FORMAT = 2  # raise it whenever the same inputs and settings give other rows
ROWS, SKIPPED = "rows.arrow", "skipped.jsonl"
JOB_BYTES = 2 * 2**20  # of a file, read and tokenised together by one process
RECORD_BYTES = 2 * 2**10  # that a record of a file which cannot be cut counts for at least
PARALLEL_BYTES = 16 * 2**20  # less is done before further processes would be at work
CHUNK_ROWS = 1000
KINDS: dict[StageName, Kind] = {"pretraining": "text", "sft": "chat", "dpo": "preference"}
COLUMNS: dict[StageName, tuple[str, ...]] = {
    "pretraining": ("input_ids", "lengths"),
    "sft": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
}
SETTINGS: dict[StageName, tuple[str, ...]] = {
    "pretraining": ("block_size", "isolate_documents"),
    "sft": ("max_source_length", "max_target_length"),
    "dpo": ("max_source_length", "max_target_length"),
}
"""The settings that change rows; any other may change without tokenising again."""

Row = dict[str, Any]
Encoder = Callable[[list[Any], "Counts"], Iterator["Row | Skipped"]]
"""Rows of records, or why a record has none; counts the rows, but for pretraining's."""


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """`dataset` is memory-mapped; `counts` are described in `Counts`."""

    folder: Path
    dataset: "Dataset"
    counts: dict[str, Any]


@dataclass(slots=True)
class Counts:
    """What went in and what came out. records = used + the sum of skipped."""

    files: list[dict[str, Any]] = field(default_factory=list)
    """{path, bytes, sha256, records, used, skipped} of each file, in the order read."""
    records: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Records that cannot be used, by reason."""
    rows: int = 0
    tokens: int = 0
    """Tokens in rows, without padding."""
    trained_tokens: int = 0
    """Tokens that a loss is taken on: every token but each segment's first (pretraining), else answers with EOS."""
    longest: int = 0
    """Tokens of the longest run of positions: a segment of a row, or a prompt with the longer answer."""
    cut_sources: int = 0
    cut_targets: int = 0
    continued: int = 0
    """Further rows that long conversations took (sft)."""
    dropped_turns: int = 0
    """Earlier turns that prompts had no room for (dpo)."""

    def add_row(self, tokens: int, trained: int, longest: int, encoded: Any = None) -> None:
        """`encoded`: a row of the chat template, which says what was cut."""
        self.rows += 1
        self.tokens += tokens
        self.trained_tokens += trained
        self.longest = max(self.longest, longest)
        self.cut_sources += getattr(encoded, "cut_sources", 0)
        self.cut_targets += getattr(encoded, "cut_targets", 0)
        self.dropped_turns += getattr(encoded, "dropped_turns", 0)

    def add(self, other: "Counts") -> None:
        """Add what was counted of further records."""
        for name, value in asdict(other).items():
            if isinstance(value, int) and name != "longest":
                setattr(self, name, getattr(self, name) + value)
        self.longest = max(self.longest, other.longest)
        for reason, number in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + number


def prepare_rows(
    stage: StageName,
    section: StageConfig,
    tokenizer: "PreTrainedTokenizerFast",
    model_max_length: int | None,
    cache_dir: Path,
) -> PreparedRows:
    """Rows of a stage's data, from `cache_dir` if they lie there whole, else made now.

    The folder is `<stage>-<key>`; the key covers the data files' contents and order, tokenizer, template and settings.
    `model_max_length`: positions that the model has, None if any. UserError: nothing usable in the data, a row longer
    than the model's positions.
    """
    found = find_files(section.data)
    hashes = hash_files([file for file, _ in found], f"hashing the data of {stage}")
    is_text = stage == "pretraining"
    inputs = {
        "row_format": ROW_FORMAT,
        # The suffix decides how a file is read; its name and place do not matter.
        "data": [
            [checksum, content_suffix(file.name), source.text if is_text else None]
            for (file, source), checksum in zip(found, hashes, strict=True)
        ],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "eos": tokenizer.eos_token_id,
        "template": None if is_text else tokenizer.chat_template,
        "settings": row_settings(stage, section),
    }
    artifact = Artifact.keyed(Path(cache_dir), stage, inputs)
    state = artifact.state()
    if state.name == "damaged":
        print(f"cached rows are damaged and will be made again: {state.why}", file=sys.stderr, flush=True)
        shutil.rmtree(artifact.folder)
    if state.name != "done":
        with artifact.building() as folder, (folder / SKIPPED).open("w", encoding="utf-8") as skipped:
            encode = ENCODERS[stage](section, tokenizer)
            counts = Counts()
            encoded = _encoded(stage, list(zip(found, hashes, strict=True)), encode, counts, skipped)
            if is_text:
                encoded = _blocks(encoded, section, counts)
            _write_table(folder / ROWS, encoded)
            artifact.facts = {"stage": stage, "counts": asdict(_finished(counts))}
    rows = open_rows(artifact.folder)
    if model_max_length and rows.counts["longest"] > model_max_length:
        keys = "block_size" if is_text else "max_source_length or max_target_length"
        raise UserError(
            f"a row of {stage} has {rows.counts['longest']} tokens in sequence, the model has {model_max_length} positions: "
            f"lower {stage}'s {keys}"
        )
    return rows


def row_settings(stage: StageName, section: StageConfig) -> dict[str, Any]:
    return {name: getattr(section, name) for name in SETTINGS[stage]}


def open_rows(folder: Path) -> PreparedRows:
    """Map the rows of a folder that `prepare_rows` gave; cheap, does not verify again."""
    from datasets import Dataset

    return PreparedRows(folder, Dataset.from_file(str(folder / ROWS)), read_counts(folder))


def read_counts(folder: Path) -> dict[str, Any]:
    """The `Counts` of a folder of rows; those made before 2026-11-25 had another word for what is skipped."""
    counts = read_manifest(folder)["counts"]
    return {"skipped": counts.get("set_aside"), **counts}


def row_costs(dataset: "Dataset") -> np.ndarray:
    """Tokens that training computes for each row (a pair's prompt is read with either answer), from list offsets alone."""

    def tokens(column: str) -> np.ndarray:
        return pc.list_value_length(dataset.data.column(column)).to_numpy()

    if "input_ids" in dataset.column_names:
        return tokens("input_ids")
    return 2 * tokens("prompt_ids") + tokens("chosen_ids") + tokens("rejected_ids")


def _write_table(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write rows as an Arrow stream, in chunks of `CHUNK_ROWS` however the batches come."""
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        kept, room = [], CHUNK_ROWS
        for batch in chain([first], batches):
            while batch.num_rows >= room:
                kept.append(batch.slice(0, room))
                writer.write_table(pa.Table.from_batches(kept).combine_chunks())
                batch, kept, room = batch.slice(room), [], CHUNK_ROWS
            if batch.num_rows:
                kept.append(batch)
                room -= batch.num_rows
        if kept:
            writer.write_table(pa.Table.from_batches(kept).combine_chunks())


def _as_batch(rows: list[Row], columns: tuple[str, ...]) -> pa.RecordBatch:
    tokens = pa.list_(pa.int32())
    schema = pa.schema([("ids", pa.list_(pa.string())), *((name, tokens) for name in columns)])
    arrays = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _finished(counts: Counts) -> Counts:
    """The counts, checked; UserError if no row came out."""
    for file in counts.files:
        file["used"] = file["records"] - file["skipped"]
    assert counts.records == counts.used + sum(counts.skipped.values()), counts
    if not counts.rows:
        most = sorted(counts.skipped.items(), key=lambda item: -item[1])[:3]
        reasons = "; ".join(f"{number} x {reason}" for reason, number in most)
        raise UserError(
            f"no usable record among {counts.records} in {', '.join(file['path'] for file in counts.files[:3])}: "
            f"{reasons or 'the files hold blank lines only'} (formats: data/README.md)"
        )
    return counts


# -------------------------------------------------------------------------------------- files -> encoded records


@dataclass(frozen=True, slots=True)
class Job:
    """Records that are encoded together: those of a span of a file, or of all of it; or as read."""

    stage: StageName
    number: int
    """Of the file."""
    file: Path
    source: DataSource
    size: int
    """Bytes of the file, for the progress."""
    span: Span | None = None
    records: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows of a job (of documents, one each: cut into blocks later), the records that cannot be used, and counts."""

    rows: pa.RecordBatch
    skipped: list[Skipped]
    counts: Counts


def _encoded(
    stage: StageName,
    files: list[tuple[tuple[Path, DataSource], str]],
    encode: Encoder,
    counts: Counts,
    skipped: TextIO,
) -> Iterator[pa.RecordBatch]:
    """Encoded records of all files in order; `files`: each with its sha256. Fills `counts`, and writes what is skipped."""
    for (file, _), checksum in files:
        about = {"path": str(file), "bytes": file.stat().st_size, "sha256": checksum}
        counts.files.append({**about, "records": 0, "used": 0, "skipped": 0})
    total = sum(file["bytes"] for file in counts.files)
    cores = len(os.sched_getaffinity(0)) if total >= PARALLEL_BYTES else 1
    jobs = (job for number, (found, _) in enumerate(files) for job in _jobs(stage, number, *found))
    with progress(f"tokenising the data of {stage}", total, "B") as advance:
        for job, encoded in in_order(partial(_encode, encode), jobs, cores):
            counts.add(encoded.counts)
            file = counts.files[job.number]
            file["records"] += encoded.counts.records
            file["skipped"] += len(encoded.skipped)
            skipped.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in encoded.skipped)
            advance(job.size)
            yield encoded.rows


def _jobs(stage: StageName, number: int, file: Path, source: DataSource) -> Iterator[Job]:
    """What a file is cut into depends on the file alone, so that any number of processes makes the same rows."""
    kind, size = KINDS[stage], file.stat().st_size
    spans = cut_training_file(kind, file, source, max(1, size // JOB_BYTES))
    if len(spans) > 1 or unpacked_size(file) < 2 * JOB_BYTES:
        for span in spans or [None]:
            yield Job(stage, number, file, source, size // max(len(spans), 1), span)
        return
    records = read_training_file(kind, file, source)
    for some in batched(records, JOB_BYTES, lambda record: max(RECORD_BYTES, len(getattr(record, "text", "")))):
        yield Job(stage, number, file, source, 0, records=some)
    yield Job(stage, number, file, source, size, records=[])


def _encode(encode: Encoder, job: Job) -> Encoded:
    found = job.records
    if found is None:
        found = list(read_training_file(KINDS[job.stage], job.file, job.source, job.span))
    skipped = [record for record in found if isinstance(record, Skipped)]
    records = [record for record in found if not isinstance(record, Skipped)]
    counts, rows = Counts(records=len(found)), []
    for row in encode(records, counts):
        (skipped if isinstance(row, Skipped) else rows).append(row)
    counts.used = len(found) - len(skipped)
    for record in skipped:
        counts.skipped[record.reason] = counts.skipped.get(record.reason, 0) + 1
    columns = ("input_ids",) if job.stage == "pretraining" else COLUMNS[job.stage]
    return Encoded(_as_batch(rows, columns), skipped, counts)


# ------------------------------------------------------------------------------------- rows of the three stages


def document_encoder(section: PretrainingConfig, tokenizer: "PreTrainedTokenizerFast") -> Encoder:
    """Tokens of each document, ended by EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("this tokenizer has no EOS token to end documents with; set eos_token in tokenizer_config.json")
    controls = control_ids(tokenizer)

    def encode(documents: list[Document], counts: Counts) -> Iterator[Row | Skipped]:
        for document, ids in zip(documents, encode_texts(tokenizer, [d.text for d in documents]), strict=True):
            reason = "empty text" if not ids else None if controls.isdisjoint(ids) else "contains a role mark"
            skipped = reason and Skipped(document.id, reason, document.text[:RAW_CHARACTERS])
            yield skipped or {"ids": [document.id], "input_ids": [*ids, tokenizer.eos_token_id]}

    return encode


def _blocks(encoded: Iterable[pa.RecordBatch], section: PretrainingConfig, counts: Counts) -> Iterator[pa.RecordBatch]:
    """Blocks of the documents in batches."""

    def documents() -> Iterator[tuple[str, np.ndarray]]:
        for batch in encoded:
            ids = batch.column("ids").flatten().to_pylist()
            column = batch.column("input_ids")
            tokens, borders = column.flatten().to_numpy(), column.offsets.to_pylist()
            yield from ((id_, tokens[a:b]) for id_, (a, b) in zip(ids, pairwise(borders), strict=True))

    for rows in batched(counted_blocks(documents(), section, counts), CHUNK_ROWS):
        yield _as_batch(rows, COLUMNS["pretraining"])


def counted_blocks(
    documents: Iterable[tuple[str, np.ndarray]], section: PretrainingConfig, counts: Counts
) -> Iterator[Row]:
    for row in cut_into_blocks(documents, section.block_size, section.isolate_documents):
        tokens = len(row["input_ids"])
        counts.add_row(tokens, tokens - len(row["lengths"]), max(row["lengths"]))
        yield row


def cut_into_blocks(documents: Iterable[tuple[str, np.ndarray]], block_size: int, isolate: bool) -> Iterator[Row]:
    """Documents joined in order and cut every `block_size` tokens; the last block may be shorter, nothing is dropped.

    A document cut at a block's end continues in the next one as a new segment. `isolate`: each document is a segment of
    its own, else the whole block is one.
    """

    def block() -> Row:
        lengths = [len(part) for part in parts]
        return {"ids": ids, "input_ids": np.concatenate(parts), "lengths": lengths if isolate else [sum(lengths)]}

    ids, parts, room = [], [], block_size
    for id_, tokens in documents:
        while len(tokens):
            part, tokens = tokens[:room], tokens[room:]
            ids.append(id_)
            parts.append(part)
            room -= len(part)
            if not room:
                yield block()
                ids, parts, room = [], [], block_size
    if parts:
        yield block()


def chat_encoder(section: InstructionConfig, tokenizer: "PreTrainedTokenizerFast") -> Encoder:
    template, limits = ChatTemplate(tokenizer), (section.max_source_length, section.max_target_length)

    def encode(chats: list[Chat], counts: Counts) -> Iterator[Row | Skipped]:
        for chat, rows in zip(chats, template.encode_chats(chats, *limits), strict=True):
            if isinstance(rows, Skipped):
                yield rows
                continue
            counts.continued += len(rows) - 1
            for row in rows:
                length = len(row.input_ids)
                counts.add_row(length, length - row.labels.count(IGNORED), length, row)
                yield {"ids": [chat.id], "input_ids": row.input_ids, "labels": row.labels}

    return encode


def preference_encoder(section: DpoConfig, tokenizer: "PreTrainedTokenizerFast") -> Encoder:
    template, limits = ChatTemplate(tokenizer), (section.max_source_length, section.max_target_length)

    def encode(preferences: list[Preference], counts: Counts) -> Iterator[Row | Skipped]:
        for preference, pair in zip(preferences, template.encode_preferences(preferences, *limits), strict=True):
            if isinstance(pair, Skipped):
                yield pair
                continue
            prompt, answers = len(pair.prompt_ids), (len(pair.chosen_ids), len(pair.rejected_ids))
            counts.add_row(prompt + sum(answers), sum(answers), prompt + max(answers), pair)
            yield {"ids": [preference.id], **{name: getattr(pair, name) for name in COLUMNS["dpo"]}}

    return encode


ENCODERS: dict[StageName, Callable[[Any, "PreTrainedTokenizerFast"], Encoder]] = {
    "pretraining": document_encoder,
    "sft": chat_encoder,
    "dpo": preference_encoder,
}
