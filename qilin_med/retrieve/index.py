"""Corpus files -> the index of an experiment: planned from its inputs, cut into chunks without documents that repeat
evaluation questions, built in steps, and opened only if it is the one that the experiment describes.

An interrupted build continues after its last whole step (embeddings: after the last whole part).
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from qilin_med.artifact import Artifact, fingerprint_model, hash_files, sha256_of, versions
from qilin_med.config.experiment import Experiment
from qilin_med.console.progress import counted, progress
from qilin_med.data.decontaminate import Hit, Index, build_index
from qilin_med.data.read.readers import find_files, raw_files, read_named_documents
from qilin_med.data.shards import batched, read_json_lines, save, save_json, write_json_lines
from qilin_med.errors import UserError
from qilin_med.records import Document, Skipped
from qilin_med.retrieve.cutting import Span, cut
from qilin_med.retrieve.models import Encoder, check_models
from qilin_med.retrieve.search import build_bm25, build_dense

INDEX_FORMAT = 2  # raise it whenever the same inputs and settings give another index
KINDS = {"bm25": ("bm25",), "dense": ("dense",), "hybrid": ("bm25", "dense")}
"""Folders of an index, by retriever."""
# Settings that matter to a search alone: free to change without a new index. The encoder counts by its contents.
ONLY_FOR_SEARCH = {"index", "exclude_sources", "exam_sources", "passages", "max_context_tokens", "query_with_options",
                   "reranker"}  # fmt: skip
OF_ENCODER = {"batch_size": True, "query_prefix": True, "model": True}
REMEDY = "build it anew with scripts/build_index.py --restart, which moves this one aside, or set retrieval.index"

TOGETHER = 1000  # documents read, compared and cut at once: all texts that are in memory
# A chunk has `document` and `source` (names), `text`, and `start` and `end`: which characters of the document it is. Beside
# the lines lie where each begins, and its source as a number in the order of the manifest.
CHUNKS, OFFSETS, SOURCES = "chunks.jsonl", "offsets.npy", "sources.npy"
LEFT_OUT, SKIPPED = "left_out.jsonl", "skipped.jsonl"


def plan_index(experiment: Experiment) -> Artifact:
    """The index's place and everything that it depends on. UserError: no corpus is named, or something is missing."""
    settings = experiment.retrieval
    if not settings.corpus:
        raise UserError(
            "retrieval.corpus names nothing: set it to the files or folders to retrieve from, for example"
            """ 'retrieval.corpus=["data/processed/pretraining"]'"""
        )
    kinds, tokenizer = KINDS[settings.retriever], tokenizer_file(experiment)
    excluded = dict.fromkeys(ONLY_FOR_SEARCH if "bm25" in kinds else {*ONLY_FOR_SEARCH, "bm25_unit"}, True)
    excluded["dense"] = OF_ENCODER if "dense" in kinds else True
    evaluation = [file for files in settings.decontamination.files for file in raw_files(files)]
    inputs = {
        "format": INDEX_FORMAT,
        "settings": settings.model_dump(mode="json", exclude=excluded),
        "tokenizer": sha256_of(tokenizer)[:16],
        "corpus": _fingerprints([file for file, _ in find_files(settings.corpus)]),
        "evaluation": _fingerprints(evaluation),
    }
    check_models(settings)
    if "dense" in kinds:
        inputs["model"] = fingerprint_model(Path(settings.dense.model))[:16]
    return Artifact(experiment.index_folder(), inputs)


def tokenizer_file(experiment: Experiment) -> Path:
    """UserError: there is none."""
    file = Path(experiment.model.path) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: not found; retrieval counts tokens with the base model's tokenizer: set model.path to"
                        " a complete model folder")  # fmt: skip
    return file


def _fingerprints(files: list[Path]) -> dict[str, str]:
    """Half a sha256 is enough to tell files apart, and to be read in a refusal."""
    return {str(file): found[:16] for file, found in zip(files, hash_files(files, "hashing"), strict=True)}


def build(experiment: Experiment, restart: bool = False, encoder: Encoder | None = None) -> bool:
    """Build the index, or continue where an earlier call was interrupted; False if it was built before. `encoder`: in
    place of the model that retrieval.dense names.

    UserError: the folder holds another index (`restart` moves it aside), or the disk is full.
    """
    index, settings = plan_index(experiment), experiment.retrieval
    if index.finished(restart, REMEDY):
        return False

    with index.building(resume=True) as out:
        written = index.work / "counts.json"  # written after the chunks: where it is, they are whole
        if not written.exists():
            save_json(written, cut_corpus(experiment, index.work, out))
        index.facts = orjson.loads(written.read_bytes())
        for kind in KINDS[settings.retriever]:
            if (out / kind).exists():
                continue
            unfinished = index.work / kind
            shutil.rmtree(unfinished, ignore_errors=True)
            texts = (chunk["text"] for chunk in read_json_lines(out / CHUNKS))
            if kind == "bm25":
                with progress("indexing terms", index.facts["chunks"], "chunks") as advance:
                    build_bm25(counted(texts, advance), settings.bm25_unit, unfinished)
            else:
                model = encoder or Encoder(settings.dense)
                say_what_is_cut((chunk["text"] for chunk in read_json_lines(out / CHUNKS)), model)
                with progress("embedding", index.facts["chunks"], "chunks") as advance:
                    build_dense(texts, model, settings.dense.index, index.work / "vectors", unfinished, advance)
            unfinished.rename(out / kind)
        index.facts["versions"] = versions("bm25s", "faiss-cpu", "jieba", "sentence-transformers")
    return True


def say_what_is_cut(texts: Iterator[str], model: Encoder) -> None:
    """Before hours are spent on embedding them."""
    if cut := sum(map(model.count_cut, batched(texts, TOGETHER))):
        print(f"{cut:,} chunks are longer than the {model.most_tokens:g} tokens that the embedding model reads: their ends cannot"
              " be found by it; lower retrieval.chunk_tokens")  # fmt: skip


def verify_index(experiment: Experiment) -> dict[str, Any]:
    """The manifest of a whole index made from exactly this corpus with these settings; UserError names what differs."""
    index = plan_index(experiment)
    state = index.state()
    if state.name != "done":
        missing = f"{index.folder}: no index here; build it with scripts/build_index.py"
        raise UserError(f"{state.why}; {REMEDY}" if state.why else missing)
    return state.manifest


def read_corpus(experiment: Experiment, work: Path) -> Iterator[Skipped | tuple[Document, str, list[Span], Hit | None]]:
    """Each document with the name of its source, its chunks, and the evaluation question that it repeats most.

    `work`: a folder for the evaluation questions. UserError: an input cannot be read.
    """
    settings, wanted = experiment.retrieval, experiment.retrieval.decontamination
    build_index(wanted, work / "evaluation", {files.name: raw_files(files) for files in wanted.files})
    questions = Index(work / "evaluation", wanted.ngram, wanted.near_miss)
    tokenizer = Tokenizer.from_file(str(tokenizer_file(experiment)))
    for some in batched(read_named_documents(settings.corpus), TOGETHER):
        yield from (record for record in some if isinstance(record, Skipped))
        named = [record for record in some if not isinstance(record, Skipped)]
        documents, texts = [document for document, _ in named], [document.text for document, _ in named]
        hits = questions.find(documents)
        cuts = cut(texts, tokenizer, settings.chunk_tokens, settings.overlap_tokens)
        for (document, source), spans, hit in zip(named, cuts, hits, strict=True):
            yield document, source, spans, hit


def cut_corpus(experiment: Experiment, work: Path, out: Path) -> dict[str, Any]:
    """Write the chunks of the corpus to `out`, with what is not indexed beside them. Returns the counts; documents
    read = indexed + left out + skipped.

    UserError: as `read_corpus`, or nothing is left to index.
    """
    documents, near_misses = Counter(read=0, indexed=0), Counter()
    left_out, skipped, sources = [], [], []  # sources: of the chunks

    def chunks(advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        for row in counted(read_corpus(experiment, work), advance):
            documents["read"] += 1
            if isinstance(row, Skipped):
                skipped.append(asdict(row))
                continue
            document, source, spans, hit = row
            names = {"document": document.id, "source": source}
            if hit and hit.same:
                # All its chunks go: the one with the explanation would still give the answer away.
                about = {"chunks": len(spans), "file": hit.file, "item": hit.item, "similarity": hit.similarity}
                left_out.append(names | about)
                continue
            near_misses.update([hit.file] if hit else [])
            documents["indexed"] += 1
            sources.extend([source] * len(spans))
            yield from ({**names, "start": a, "end": b, "text": document.text[a:b]} for a, b in spans)

    with progress("cutting the corpus", unit="documents") as advance:
        offsets = write_json_lines(out / CHUNKS, chunks(advance))
    documents.update(left_out=len(left_out), skipped=len(skipped))
    assert 2 * documents["read"] == documents.total(), documents
    if not sources:
        raise UserError(f"retrieval.corpus holds nothing to index: of {documents['read']} documents {documents['left_out']}"
                        f" repeat evaluation questions and {documents['skipped']} are unusable; name other files")  # fmt: skip
    save(out / OFFSETS, np.array(offsets, np.uint64))
    by_source = Counter(sources)
    numbers = {name: number for number, name in enumerate(by_source)}
    save(out / SOURCES, np.array([numbers[name] for name in sources], np.uint32))
    write_json_lines(out / LEFT_OUT, left_out)
    write_json_lines(out / SKIPPED, skipped)
    files = Counter(row["file"] for row in left_out)
    return {
        "chunks": len(sources),
        "sources": by_source,
        "documents": documents,
        "skipped": Counter(row["reason"] for row in skipped),
        "left_out_documents": files,
        "left_out_chunks": {name: sum(row["chunks"] for row in left_out if row["file"] == name) for name in files},
        "near_misses": near_misses,
    }
