"""Corpus files -> the chunks of an index, without documents that repeat evaluation questions."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qilin_med.config.experiment import RetrievalConfig
from qilin_med.console.progress import progress
from qilin_med.data.decontaminate import Hit, Index, build_index
from qilin_med.data.read.records import read_named_documents
from qilin_med.data.shards import chunks as in_chunks
from qilin_med.data.shards import write_lines
from qilin_med.errors import UserError
from qilin_med.records import Document, Skipped
from qilin_med.retrieve.chunks import Chunk, write_chunks
from qilin_med.retrieve.cutting import Cutter

TOGETHER = 1000  # documents read, compared and cut at once: all texts that are in memory
LEFT_OUT, SKIPPED = "left_out.jsonl", "skipped.jsonl"
# What stands between stem, options and answers in running text, and would break the n-grams of short ones.
MARKS = re.compile(r"^\s*(?:[(（]?[A-Z][)）.．、:：\s]|(?:问|答|患者|医生)[:：])\s*", re.MULTILINE)


@dataclass
class Intake:
    """One pass over a corpus, and what it counted: documents = indexed + left out + skipped."""

    settings: RetrievalConfig
    cutter: Cutter
    evaluation: Index
    counts: dict[str, Counter] = field(
        default_factory=lambda: {
            "documents": Counter(read=0, indexed=0, left_out=0, skipped=0),
            "skipped": Counter(),  # by reason
            "left_out_documents": Counter(),  # by evaluation file
            "left_out_chunks": Counter(),
            "near_misses": Counter(),
        }
    )
    advance: Callable[[int], None] = lambda n: None
    """Hears of documents read."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks to index, streamed."""
        for some in in_chunks(self._documents(), TOGETHER):
            documents = [document for document, _ in some]
            hits = self.evaluation.find(documents, [MARKS.sub("", document.text) for document in documents])
            cuts = self.cutter.cut([document.text for document in documents])
            for (document, source), spans, hit in zip(some, cuts, hits, strict=True):
                if not self._is_left_out(document, source, hit, len(spans)):
                    self.counts["documents"]["indexed"] += 1
                    yield from (Chunk(document.id, source, a, b, document.text[a:b]) for a, b in spans)
            self.advance(len(some))

    def _documents(self) -> Iterator[tuple[Document, str]]:
        for record in read_named_documents(self.settings.corpus):
            self.counts["documents"]["read"] += 1
            if isinstance(record, Skipped):
                self.counts["documents"]["skipped"] += 1
                self.counts["skipped"][record.reason] += 1
                self.skipped.append(asdict(record))
            else:
                yield record

    def _is_left_out(self, document: Document, source: str, hit: Hit | None, chunks: int) -> bool:
        """Whether a document repeats an evaluation question. All its chunks go: beside the chunk that asks, the one
        that explains would still give the answer away."""
        if hit is None:
            return False
        if hit.coverage < self.settings.decontamination.coverage:
            self.counts["near_misses"][hit.file] += 1
            return False
        self.counts["documents"]["left_out"] += 1
        self.counts["left_out_documents"][hit.file] += 1
        self.counts["left_out_chunks"][hit.file] += chunks
        about = {"document": document.id, "source": source, "chunks": chunks}
        self.left_out.append({**about, "file": hit.file, "item": hit.item, "coverage": hit.coverage})
        return True


def cut_corpus(
    settings: RetrievalConfig, tokenizer: Path, evaluation: dict[str, list[Path]], work: Path, out: Path
) -> dict[str, Any]:
    """Write the chunks of the corpus to `out`, with `left_out.jsonl` and `skipped.jsonl`; returns the counts.

    UserError: an input cannot be read, or nothing is left to index.
    """
    wanted = settings.decontamination
    build_index(wanted, work / "evaluation", evaluation)
    cutter = Cutter(tokenizer, settings.chunk_tokens, settings.overlap_tokens)
    intake = Intake(settings, cutter, Index(work / "evaluation", wanted.ngram, wanted.near_miss))
    with progress("cutting the corpus", unit="documents") as intake.advance:
        by_source = write_chunks(out, intake.chunks())
    documents = intake.counts["documents"]
    if not by_source:
        raise UserError(
            f"retrieval.corpus holds nothing to index: of {documents['read']} documents {documents['left_out']} repeat"
            f" evaluation questions and {documents['skipped']} are unusable; name other files"
        )
    assert documents["read"] == documents["indexed"] + documents["left_out"] + documents["skipped"], documents
    write_lines(out / LEFT_OUT, intake.left_out)
    write_lines(out / SKIPPED, intake.skipped)
    return {"chunks": by_source.total(), "sources": dict(by_source), **{k: dict(v) for k, v in intake.counts.items()}}
