"""Records -> cached training rows: tokenised once, by one process, before any rank starts.

The columns of a stage's rows (lists of int32 unless said otherwise):

- pretraining: `ids` (texts: the records that the row holds parts of), `input_ids`, `lengths` (tokens of each segment)
- sft: `ids` (one), `input_ids`, `labels` (-100 where nothing is learnt, unshifted)
- dpo: `ids` (one), `prompt_ids`, `chosen_ids`, `rejected_ids`

A cache folder is an artifact: rows.arrow, skipped.jsonl and MANIFEST.json (sizes, sha256, inputs, counts).
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
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
    PretrainingConfig,
    StageConfig,
    StageName,
)
from qilin_med.console.progress import progress
from qilin_med.data.read.files import content_suffix
from qilin_med.data.read.readers import find_files, read_chats, read_documents, read_preferences
from qilin_med.data.shards import batched
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

Row = dict[str, list[Any]]


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
            reader = RecordReader(stage, list(zip(found, hashes, strict=True)), skipped)
            _write_table(folder / ROWS, COLUMNS[stage], ENCODERS[stage](reader, section, tokenizer))
            artifact.facts = {"stage": stage, "counts": asdict(reader.finish())}
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


def _write_table(path: Path, columns: tuple[str, ...], rows: Iterable[Row]) -> None:
    """Write rows as an Arrow stream, chunk by chunk."""
    tokens = pa.list_(pa.int32())
    schema = pa.schema([("ids", pa.list_(pa.string())), *((name, tokens) for name in columns)])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for chunk in batched(rows, CHUNK_ROWS):
            arrays = [pa.array([row[name] for row in chunk], schema.field(name).type) for name in schema.names]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


class RecordReader:
    """Reads records in batches, keeps those that cannot be used beside the rows, and counts both."""

    def __init__(self, stage: StageName, files: list[tuple[tuple[Path, DataSource], str]], skipped: TextIO) -> None:
        """`files`: each with its sha256."""
        self.counts, self._stage, self._files, self._skipped = Counts(), stage, files, skipped

    def encoded(self, encode: Callable[[list[Any]], Iterable[Any]]) -> Iterator[tuple[Any, Any]]:
        """Each record with what `encode` makes of it, batch by batch; where that is a `Skipped`, it is skipped."""
        for batch in self.batches():
            for record, encoded in zip(batch, encode(batch), strict=True):
                if isinstance(encoded, Skipped):
                    self.skip(encoded)
                    continue
                self.counts.used += 1
                yield record, encoded

    def batches(self) -> Iterator[list[Any]]:
        """Records of all files in order. A batch never spans two files, so that what is skipped while a batch is
        worked on counts for the newest file."""
        for (file, source), checksum in self._files:
            about = {"path": str(file), "bytes": file.stat().st_size, "sha256": checksum}
            self.counts.files.append({**about, "records": 0, "used": 0, "skipped": 0})
            batch, characters = [], 0
            with progress(f"tokenising {file}", unit="records") as advance:
                for record in READERS[self._stage]([DataSource(path=str(file), text=source.text)]):
                    self.counts.records += 1
                    self.counts.files[-1]["records"] += 1
                    if isinstance(record, Skipped):
                        self.skip(record)
                        continue
                    batch.append(record)
                    characters += len(record.text) if isinstance(record, Document) else 0
                    if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
                        yield batch
                        advance(len(batch))
                        batch, characters = [], 0
                if batch:
                    yield batch
                    advance(len(batch))

    def skip(self, record: Skipped) -> None:
        self.counts.skipped[record.reason] = self.counts.skipped.get(record.reason, 0) + 1
        self.counts.files[-1]["skipped"] += 1
        self._skipped.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")

    def finish(self) -> Counts:
        """The counts, checked; UserError if no row came out."""
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


# ------------------------------------------------------------------------------------- rows of the three stages


def encode_documents(
    reader: RecordReader, section: PretrainingConfig, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Row]:
    for row in cut_into_blocks(_tokenised_documents(reader, tokenizer), section.block_size, section.isolate_documents):
        tokens = len(row["input_ids"])
        reader.counts.add_row(tokens, tokens - len(row["lengths"]), max(row["lengths"]))
        yield row


def _tokenised_documents(reader: RecordReader, tokenizer: "PreTrainedTokenizerFast") -> Iterator[tuple[str, list[int]]]:
    """Id and tokens of each document, ended by EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("this tokenizer has no EOS token to end documents with; set eos_token in tokenizer_config.json")
    controls = control_ids(tokenizer)

    def encode(batch: list[Document]) -> Iterator[list[int] | Skipped]:
        for document, ids in zip(batch, encode_texts(tokenizer, [d.text for d in batch]), strict=True):
            reason = "empty text" if not ids else None if controls.isdisjoint(ids) else "contains a role mark"
            skipped = reason and Skipped(document.id, reason, document.text[:RAW_CHARACTERS])
            yield skipped or [*ids, tokenizer.eos_token_id]

    return ((document.id, ids) for document, ids in reader.encoded(encode))


def cut_into_blocks(documents: Iterable[tuple[str, list[int]]], block_size: int, isolate: bool) -> Iterator[Row]:
    """Documents joined in order and cut every `block_size` tokens; the last block may be shorter, nothing is dropped.

    A document cut at a block's end continues in the next one as a new segment. `isolate`: each document is a segment of
    its own, else the whole block is one.
    """

    def finished(block: Row) -> Row:
        return block if isolate else {**block, "lengths": [len(block["input_ids"])]}

    block: Row = {"ids": [], "input_ids": [], "lengths": []}
    for id_, tokens in documents:
        start = 0
        while start < len(tokens):
            part = tokens[start : start + block_size - len(block["input_ids"])]
            for column, value in zip(block, ([id_], part, [len(part)]), strict=True):
                block[column] += value
            start += len(part)
            if len(block["input_ids"]) == block_size:
                yield finished(block)
                block = {"ids": [], "input_ids": [], "lengths": []}
    if block["input_ids"]:
        yield finished(block)


def encode_chats(
    reader: RecordReader, section: InstructionConfig, tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Row]:
    template, limits = ChatTemplate(tokenizer), (section.max_source_length, section.max_target_length)
    for chat, rows in reader.encoded(lambda batch: template.encode_chats(batch, *limits)):
        reader.counts.continued += len(rows) - 1
        for row in rows:
            length = len(row.input_ids)
            reader.counts.add_row(length, length - row.labels.count(IGNORED), length, row)
            yield {"ids": [chat.id], "input_ids": row.input_ids, "labels": row.labels}


def encode_preferences(reader: RecordReader, section: DpoConfig, tokenizer: "PreTrainedTokenizerFast") -> Iterator[Row]:
    template, limits = ChatTemplate(tokenizer), (section.max_source_length, section.max_target_length)
    for preference, pair in reader.encoded(lambda batch: template.encode_preferences(batch, *limits)):
        prompt, answers = len(pair.prompt_ids), (len(pair.chosen_ids), len(pair.rejected_ids))
        reader.counts.add_row(prompt + sum(answers), sum(answers), prompt + max(answers), pair)
        yield {"ids": [preference.id], **{name: getattr(pair, name) for name in COLUMNS["dpo"]}}


ENCODERS: dict[StageName, Callable[[RecordReader, Any, "PreTrainedTokenizerFast"], Iterator[Row]]] = {
    "pretraining": encode_documents,
    "sft": encode_chats,
    "dpo": encode_preferences,
}
