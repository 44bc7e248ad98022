"""Records -> cached training rows: tokenised once, by one process, before any rank starts.

The columns of a stage's rows (lists of int32 unless said otherwise):

- pretraining: `ids` (texts: the records that the row holds parts of), `input_ids`, `lengths` (tokens of each segment)
- sft: `ids` (one), `input_ids`, `labels` (-100 where nothing is learnt, unshifted)
- dpo: `ids` (one), `prompt_ids`, `chosen_ids`, `rejected_ids`

A cache folder holds rows.arrow, skipped.jsonl and MANIFEST.json (sizes, sha256, settings, counts), and appears under
its name only when complete.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qilin_med.artifact import digest, hash_files, publish_folder, read_manifest, verify_folder
from qilin_med.config.experiment import (
    DataSource,
    DpoConfig,
    InstructionConfig,
    PretrainingConfig,
    StageConfig,
    StageName,
)
from qilin_med.console.progress import progress
from qilin_med.data.read.records import find_files, read_chats, read_documents, read_preferences
from qilin_med.data.shards import chunks
from qilin_med.errors import UserError
from qilin_med.prompt.template import IGNORED, ChatTemplate, control_ids, encode_texts
from qilin_med.records import RAW_CHARACTERS, Document, Skipped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

ROW_FORMAT = 2  # raise it whenever the same inputs and settings give other rows
ROWS, SKIPPED = "rows.arrow", "skipped.jsonl"
BATCH_RECORDS = 1000  # tokenised at once, on all cores
BATCH_CHARACTERS = 4_000_000  # fewer records where they are whole books
CHUNK_ROWS = 1000
READERS: dict[StageName, Callable[[list[DataSource]], Iterator[Any]]] = {
    "pretraining": read_documents,
    "sft": read_chats,
    "dpo": read_preferences,
}
TOKENS = pa.list_(pa.int32())
SCHEMAS: dict[StageName, pa.Schema] = {
    stage: pa.schema([("ids", pa.list_(pa.string())), *((name, TOKENS) for name in columns)])
    for stage, columns in {
        "pretraining": ("input_ids", "lengths"),
        "sft": ("input_ids", "labels"),
        "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    }.items()
}

Row = dict[str, list[Any]]
DataFile = tuple[Path, DataSource, str]
"""A file, the source that named it, the file's sha256."""


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
    files = [(file, source, checksum) for (file, source), checksum in zip(found, hashes, strict=True)]
    inputs = _describe_inputs(stage, section, tokenizer, files)
    folder = Path(cache_dir) / f"{stage}-{digest(inputs)[:16]}"
    if not _is_whole(folder):
        _build(stage, section, tokenizer, files, inputs, folder)
    prepared = open_rows(folder)
    _check_positions(stage, prepared.counts["longest"], model_max_length)
    return prepared


def open_rows(folder: Path) -> PreparedRows:
    """Map the rows of a folder that `prepare_rows` gave; cheap, does not verify again."""
    from datasets import Dataset

    manifest = read_manifest(folder)
    return PreparedRows(folder, Dataset.from_file(str(folder / ROWS)), manifest["counts"])


def row_costs(dataset: "Dataset") -> np.ndarray:
    """Tokens that training computes for each row (a pair's prompt is read with either answer), from list offsets alone."""

    def tokens(column: str) -> np.ndarray:
        return pc.list_value_length(dataset.data.column(column)).to_numpy()

    if "input_ids" in dataset.column_names:
        return tokens("input_ids")
    return 2 * tokens("prompt_ids") + tokens("chosen_ids") + tokens("rejected_ids")


# --------------------------------------------------------------------------------------------------------- cache


def row_settings(stage: StageName, section: StageConfig) -> dict[str, Any]:
    """The settings that change rows; any other may change without tokenising again."""
    limits = ("max_source_length", "max_target_length")
    names = {"pretraining": ("block_size", "isolate_documents"), "sft": limits, "dpo": limits}
    return {name: getattr(section, name) for name in names[stage]}


def _describe_inputs(
    stage: StageName, section: StageConfig, tokenizer: "PreTrainedTokenizerFast", files: list[DataFile]
) -> dict[str, Any]:
    """All that rows depend on; its digest is the cache key."""
    is_text = stage == "pretraining"
    return {
        "row_format": ROW_FORMAT,
        # The suffix decides how a file is read; its name and place do not matter.
        "data": [[checksum, file.suffix, source.text if is_text else None] for file, source, checksum in files],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "eos": tokenizer.eos_token_id,
        "template": None if is_text else tokenizer.chat_template,
        "settings": row_settings(stage, section),
    }


def _is_whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        verify_folder(folder)
    except UserError as error:
        print(f"cached rows are damaged and will be made again: {error}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        return False
    return True


def _build(
    stage: StageName,
    section: StageConfig,
    tokenizer: "PreTrainedTokenizerFast",
    files: list[DataFile],
    inputs: dict[str, Any],
    folder: Path,
) -> None:
    temporary = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    try:
        intake = Intake(stage, files, temporary / SKIPPED)
        WRITERS[stage](intake, section, tokenizer, temporary)
        counts = intake.finish()
        publish_folder(temporary, folder, {"stage": stage, "inputs": inputs, "counts": asdict(counts)})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_positions(stage: StageName, longest: int, model_max_length: int | None) -> None:
    if model_max_length and longest > model_max_length:
        keys = "block_size" if stage == "pretraining" else "max_source_length or max_target_length"
        raise UserError(
            f"a row of {stage} has {longest} tokens in sequence, the model has {model_max_length} positions: "
            f"lower {stage}'s {keys}"
        )


# -------------------------------------------------------------------------------------------------------- intake


class Intake:
    """Reads records in batches, keeps aside what cannot be used, and counts both."""

    def __init__(self, stage: StageName, files: list[DataFile], notes: Path):
        self.counts = Counts()
        self._stage = stage
        self._files = files
        self._notes = notes.open("w", encoding="utf-8")

    def batches(self) -> Iterator[list[Any]]:
        """Records of all files in order. A batch never spans two files, so that what is skipped while a batch is
        worked on counts for the newest file."""
        for file, source, checksum in self._files:
            about = {"path": str(file), "bytes": file.stat().st_size, "sha256": checksum}
            self.counts.files.append({**about, "records": 0, "used": 0, "skipped": 0})
            source_of_file = DataSource(path=str(file), text=source.text)
            with progress(f"tokenising {file}", unit="records") as advance:
                for batch in _in_batches(self._usable(READERS[self._stage]([source_of_file]))):
                    yield batch
                    advance(len(batch))

    def _usable(self, records: Iterable[Any]) -> Iterator[Any]:
        for record in records:
            self.counts.records += 1
            self.counts.files[-1]["records"] += 1
            if isinstance(record, Skipped):
                self.skip(record)
            else:
                yield record

    def skip(self, record: Skipped) -> None:
        self.counts.skipped[record.reason] = self.counts.skipped.get(record.reason, 0) + 1
        self.counts.files[-1]["skipped"] += 1
        self._notes.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")

    def finish(self) -> Counts:
        """The counts, checked; UserError if no row came out."""
        self._notes.close()
        counts = self.counts
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


def _in_batches(records: Iterable[Any]) -> Iterator[list[Any]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += len(record.text) if isinstance(record, Document) else 0
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------- pretraining


def _write_documents(
    intake: Intake, section: PretrainingConfig, tokenizer: "PreTrainedTokenizerFast", folder: Path
) -> None:
    documents = _tokenised_documents(intake, tokenizer)
    rows = cut_into_blocks(documents, section.block_size, section.isolate_documents)
    _write_table(folder / ROWS, SCHEMAS["pretraining"], _counted(rows, intake.counts))


def _tokenised_documents(intake: Intake, tokenizer: "PreTrainedTokenizerFast") -> Iterator[tuple[str, list[int]]]:
    """Id and tokens of each document, ended by EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("this tokenizer has no EOS token to end documents with; set eos_token in tokenizer_config.json")
    controls = control_ids(tokenizer)
    for batch in intake.batches():
        for document, ids in zip(batch, encode_texts(tokenizer, [d.text for d in batch]), strict=True):
            reason = "empty text" if not ids else None if controls.isdisjoint(ids) else "contains a role mark"
            if reason:
                intake.skip(Skipped(document.id, reason, document.text[:RAW_CHARACTERS]))
                continue
            intake.counts.used += 1
            yield document.id, [*ids, tokenizer.eos_token_id]


def cut_into_blocks(documents: Iterable[tuple[str, list[int]]], block_size: int, isolate: bool) -> Iterator[Row]:
    """Documents joined in order and cut every `block_size` tokens; the last block may be shorter, nothing is dropped.

    A document cut at a block's end continues in the next one as a new segment. `isolate`: each document is a segment of
    its own, else the whole block is one.
    """
    block: Row = {"ids": [], "input_ids": [], "lengths": []}
    for id_, tokens in documents:
        start = 0
        while start < len(tokens):
            part = tokens[start : start + block_size - len(block["input_ids"])]
            for column, value in zip(block, ([id_], part, [len(part)]), strict=True):
                block[column] += value
            start += len(part)
            if len(block["input_ids"]) == block_size:
                yield _as_segments(block, isolate)
                block = {"ids": [], "input_ids": [], "lengths": []}
    if block["input_ids"]:
        yield _as_segments(block, isolate)


def _as_segments(block: Row, isolate: bool) -> Row:
    return block if isolate else {**block, "lengths": [len(block["input_ids"])]}


def _counted(rows: Iterable[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.rows += 1
        counts.tokens += len(row["input_ids"])
        counts.trained_tokens += len(row["input_ids"]) - len(row["lengths"])
        counts.longest = max(counts.longest, *row["lengths"])
        yield row


# ----------------------------------------------------------------------------------------------------------- sft


def _write_chats(
    intake: Intake, section: InstructionConfig, tokenizer: "PreTrainedTokenizerFast", folder: Path
) -> None:
    _write_table(folder / ROWS, SCHEMAS["sft"], _encoded_chats(intake, section, ChatTemplate(tokenizer)))


def _encoded_chats(intake: Intake, section: InstructionConfig, template: ChatTemplate) -> Iterator[Row]:
    counts = intake.counts
    for batch in intake.batches():
        encoded = template.encode_chats(batch, section.max_source_length, section.max_target_length)
        for chat, rows in zip(batch, encoded, strict=True):
            if isinstance(rows, Skipped):
                intake.skip(rows)
                continue
            counts.used += 1
            counts.continued += len(rows) - 1
            for row in rows:
                length = len(row.input_ids)
                counts.rows += 1
                counts.tokens += length
                counts.trained_tokens += length - row.labels.count(IGNORED)
                counts.longest = max(counts.longest, length)
                counts.cut_sources += row.cut_sources
                counts.cut_targets += row.cut_targets
                yield {"ids": [chat.id], "input_ids": row.input_ids, "labels": row.labels}


# ----------------------------------------------------------------------------------------------------------- dpo


def _write_preferences(intake: Intake, section: DpoConfig, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    _write_table(folder / ROWS, SCHEMAS["dpo"], _encoded_preferences(intake, section, ChatTemplate(tokenizer)))


def _encoded_preferences(intake: Intake, section: DpoConfig, template: ChatTemplate) -> Iterator[Row]:
    counts = intake.counts
    for batch in intake.batches():
        encoded = template.encode_preferences(batch, section.max_source_length, section.max_target_length)
        for preference, pair in zip(batch, encoded, strict=True):
            if isinstance(pair, Skipped):
                intake.skip(pair)
                continue
            answers = len(pair.chosen_ids), len(pair.rejected_ids)
            counts.used += 1
            counts.rows += 1
            counts.tokens += len(pair.prompt_ids) + sum(answers)
            counts.trained_tokens += sum(answers)
            counts.longest = max(counts.longest, len(pair.prompt_ids) + max(answers))
            counts.cut_sources += pair.cut_sources
            counts.cut_targets += pair.cut_targets
            counts.dropped_turns += pair.dropped_turns
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            yield {"ids": [preference.id], **{name: getattr(pair, name) for name in names}}


# -------------------------------------------------------------------------------------------------------- tables


def _write_table(path: Path, schema: pa.Schema, rows: Iterable[Row]) -> None:
    """Write rows as an Arrow stream, chunk by chunk."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for chunk in chunks(rows, CHUNK_ROWS):
            columns = [pa.array([row[name] for row in chunk], schema.field(name).type) for name in schema.names]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


WRITERS: dict[StageName, Callable[[Intake, Any, "PreTrainedTokenizerFast", Path], None]] = {
    "pretraining": _write_documents,
    "sft": _write_chats,
    "dpo": _write_preferences,
}
