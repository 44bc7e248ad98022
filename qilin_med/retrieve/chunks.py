"""Corpus files -> the chunks of an index on disk, without documents that repeat evaluation questions."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from qilin_med.config.experiment import RetrievalConfig
from qilin_med.data.decontaminate import Index, build_index
from qilin_med.data.read.readers import raw_files
from qilin_med.data.read.records import read_named_documents
from qilin_med.data.shards import chunks as in_chunks
from qilin_med.data.shards import load, read_lines, save, save_json, write_lines
from qilin_med.errors import UserError
from qilin_med.records import Skipped
from qilin_med.retrieve.cutting import Cutter

TOGETHER = 1000  # documents read, compared and cut at once: all texts that are in memory
LINES, OFFSETS, SOURCES, NAMES = "chunks.jsonl", "offsets.npy", "sources.npy", "sources.json"
LEFT_OUT, SKIPPED = "left_out.jsonl", "skipped.jsonl"
# What stands between stem, options and answers in running text, and would break the n-grams of short ones.
MARKS = re.compile(r"^\s*(?:[(（]?[A-Z][)）.．、:：\s]|(?:问|答|患者|医生)[:：])\s*", re.MULTILINE)


class Chunks:
    """The chunks of an index, by number from 0: JSON lines with random access, and the source of each as a number.

    A chunk has `document` and `source` (names), `text`, and `start` and `end`: which characters of the document it is.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._offsets = load(folder / OFFSETS)
        self._lines = np.asarray(np.memmap(folder / LINES, mode="r"))
        self.sources: list[str] = orjson.loads((folder / NAMES).read_bytes())["sources"]
        """Names of all sources, in the order of their first chunks."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        return orjson.loads(self._lines[int(self._offsets[number]) : int(self._offsets[number + 1])].tobytes())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All chunks in order, streamed."""
        return read_lines(self._folder / LINES)

    def allowed(self, excluded: list[str]) -> np.ndarray | None:
        """Which chunks stem from none of these sources (bool for each chunk); None: all."""
        if not excluded:
            return None
        numbers = [number for number, name in enumerate(self.sources) if name in excluded]
        return ~np.isin(load(self._folder / SOURCES), numbers)


def cut_corpus(
    settings: RetrievalConfig, tokenizer: Path, work: Path, out: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Write the chunks of the corpus to `out` (in memory: some 50 bytes for each, none of their text), with what is not
    indexed beside them. Returns the counts; documents read = indexed + left out + skipped.

    `work`: a folder for the evaluation questions. `advance` hears of documents read.
    UserError: an input cannot be read, or nothing is left to index.
    """
    wanted = settings.decontamination
    build_index(wanted, work / "evaluation", {files.name: raw_files(files) for files in wanted.files})
    questions = Index(work / "evaluation", wanted.ngram, wanted.near_miss)
    cutter = Cutter(tokenizer, settings.chunk_tokens, settings.overlap_tokens)
    documents, near_misses = Counter(read=0, indexed=0, left_out=0, skipped=0), Counter()
    numbers: dict[str, int] = {}  # of sources
    sources: list[int] = []  # of chunks
    left_out, skipped = [], []

    def chunks() -> Iterator[dict[str, Any]]:
        for some in in_chunks(read_named_documents(settings.corpus), TOGETHER):
            documents["read"] += len(some)
            skipped.extend(asdict(record) for record in some if isinstance(record, Skipped))
            named = [record for record in some if not isinstance(record, Skipped)]
            texts = [document.text for document, _ in named]
            hits = questions.find([document for document, _ in named], [MARKS.sub("", text) for text in texts])
            for (document, source), spans, hit in zip(named, cutter.cut(texts), hits, strict=True):
                if hit and hit.coverage >= wanted.coverage:
                    # All its chunks go: beside the chunk that asks, the one that explains would still give the answer away.
                    about = {"document": document.id, "source": source, "chunks": len(spans)}
                    left_out.append({**about, "file": hit.file, "item": hit.item, "coverage": hit.coverage})
                    continue
                if hit:
                    near_misses[hit.file] += 1
                documents["indexed"] += 1
                sources.extend([numbers.setdefault(source, len(numbers))] * len(spans))
                names = {"document": document.id, "source": source}
                yield from ({**names, "start": a, "end": b, "text": document.text[a:b]} for a, b in spans)
            advance(len(some))

    offsets = write_lines(out / LINES, chunks())
    documents.update(left_out=len(left_out), skipped=len(skipped))
    if not sources:
        raise UserError(
            f"retrieval.corpus holds nothing to index: of {documents['read']} documents {documents['left_out']} repeat"
            f" evaluation questions and {documents['skipped']} are unusable; name other files"
        )
    assert documents["read"] == documents["indexed"] + documents["left_out"] + documents["skipped"], documents
    save(out / OFFSETS, np.array(offsets, np.uint64))
    save(out / SOURCES, np.array(sources, np.uint32))
    save_json(out / NAMES, {"sources": list(numbers)})
    write_lines(out / LEFT_OUT, left_out)
    write_lines(out / SKIPPED, skipped)
    left_out_chunks: Counter[str] = Counter()
    for row in left_out:
        left_out_chunks[row["file"]] += row["chunks"]
    return {
        "chunks": len(sources),
        "sources": dict(zip(numbers, np.bincount(sources).tolist(), strict=True)),
        "documents": dict(documents),
        "skipped": dict(Counter(row["reason"] for row in skipped)),
        "left_out_documents": dict(Counter(row["file"] for row in left_out)),
        "left_out_chunks": dict(left_out_chunks),
        "near_misses": dict(near_misses),
    }
