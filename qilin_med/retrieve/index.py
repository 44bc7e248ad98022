"""The index of an experiment: planned from its inputs, built in steps, published as one folder, opened only if it is
the one that the experiment describes.

An interrupted build continues after its last whole step (embeddings: after the last whole part), in a work folder
named by a digest of everything that the index depends on.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qilin_med.artifact import (
    commit,
    differences,
    digest,
    disk_errors_explained,
    hash_files,
    publish_folder,
    quarantine,
    remove_unfinished,
    sha256_of,
    verify_folder,
)
from qilin_med.config.experiment import Experiment, RetrievalConfig
from qilin_med.console.progress import counted, progress
from qilin_med.data.read.readers import raw_files
from qilin_med.data.read.records import find_files
from qilin_med.data.shards import save_json
from qilin_med.errors import UserError
from qilin_med.retrieve.bm25 import build_bm25
from qilin_med.retrieve.chunks import Chunks
from qilin_med.retrieve.cutting import load_tokenizer
from qilin_med.retrieve.dense import INDEX, Encoder, build_dense, encode_parts, fingerprint_encoder, load_encoder
from qilin_med.retrieve.intake import cut_corpus

INDEX_FORMAT = 1  # raise it whenever the same inputs and settings give another index
# Settings that matter to a search alone: free to change without a new index.
ONLY_FOR_SEARCH = {"index", "exclude_sources", "exam_sources", "passages", "max_context_tokens", "query_with_options"}
LIBRARIES = ("bm25s", "faiss-cpu", "jieba", "tokenizers")
SHOWN = 4  # differences named in a refusal
COUNTS = "counts.json"
REMEDY = "build it anew with scripts/build_index.py --restart, which moves this one aside, or set retrieval.index"


@dataclass(frozen=True)
class IndexPlan:
    """Everything that an index depends on, known before it is built."""

    settings: RetrievalConfig
    folder: Path
    tokenizer: Path
    """tokenizer.json of the base model."""
    evaluation: dict[str, list[Path]]
    """Files of each evaluation entry."""
    inputs: dict[str, Any]

    @property
    def work(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.work") / digest(self.inputs)[:16]

    @property
    def has_bm25(self) -> bool:
        return self.settings.retriever != "dense"

    @property
    def has_dense(self) -> bool:
        return self.settings.retriever != "bm25"


def plan_index(experiment: Experiment) -> IndexPlan:
    """Find and fingerprint every input. UserError: no corpus is named, or something is missing."""
    settings = experiment.retrieval
    if not settings.corpus:
        raise UserError(
            "retrieval.corpus names nothing: set it to the files or folders to retrieve from, for example"
            """ 'retrieval.corpus=["data/processed/pretraining"]'"""
        )
    tokenizer = Path(experiment.model.path) / "tokenizer.json"
    load_tokenizer(tokenizer)
    evaluation = {files.name: raw_files(files) for files in settings.decontamination.files}
    inputs = {
        "format": INDEX_FORMAT,
        "settings": _settings_of(settings),
        "tokenizer": _short(tokenizer),
        "corpus": _short_all([file for file, _ in find_files(settings.corpus)]),
        "evaluation": _short_all([file for files in evaluation.values() for file in files]),
    }
    if settings.retriever != "bm25":
        inputs["model"] = fingerprint_encoder(settings.dense)[:16]
    return IndexPlan(settings, experiment.index_folder(), tokenizer, evaluation, inputs)


def _short(file: Path) -> str:
    """Half a sha256 is enough to tell files apart, and to be read in a refusal."""
    return sha256_of(file)[:16]


def _short_all(files: list[Path]) -> dict[str, str]:
    return {str(file): found[:16] for file, found in zip(files, hash_files(files, "hashing"), strict=True)}


def _settings_of(settings: RetrievalConfig) -> dict[str, Any]:
    """What the index depends on."""
    unused = {"bm25_unit"} if settings.retriever == "dense" else {"dense"} if settings.retriever == "bm25" else set()
    kept = settings.model_dump(mode="json", exclude=ONLY_FOR_SEARCH | unused)
    for key in ("batch_size", "query_prefix", "model"):  # the model counts by its contents
        kept.get("dense", {}).pop(key, None)
    return kept


# --------------------------------------------------------------------------------------------------------- build


def build(plan: IndexPlan, restart: bool = False, encoder: Encoder | None = None) -> Literal["built", "built before"]:
    """Build and publish, or continue where an earlier call was interrupted. `encoder`: instead of the config's model.

    UserError: the folder holds another index (`restart` moves it aside), or the disk is full.
    """
    if plan.folder.exists() and not _make_way(plan, restart):
        shutil.rmtree(plan.work.parent, ignore_errors=True)  # left by a kill right after publishing
        return "built before"
    with disk_errors_explained(plan.folder):
        out = plan.work / "out"
        out.mkdir(parents=True, exist_ok=True)
        counts = _cut(plan, out)
        if plan.has_bm25:
            with progress("indexing terms", counts["chunks"], "chunks") as advance:
                texts = counted(Chunks(out).texts(), advance)
                _once(out / "bm25", lambda folder: build_bm25(texts, plan.settings.bm25_unit, folder))
        if plan.has_dense:
            with progress("embedding", counts["chunks"], "chunks") as advance:
                _embed(plan, out, encoder, advance)
        remove_unfinished(out)
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        publish_folder(out, plan.folder, {**counts, "inputs": plan.inputs, "versions": versions, "commit": commit()})
        shutil.rmtree(plan.work.parent)
    return "built"


def _make_way(plan: IndexPlan, restart: bool) -> bool:
    """Whether there is something to build."""
    try:
        verify_index(plan)
        return False
    except UserError as error:
        if not restart:
            raise
        print(f"{error}; kept as {quarantine(plan.folder, 'replaced')}", flush=True)
    return True


def _cut(plan: IndexPlan, out: Path) -> dict[str, Any]:
    """The chunks; their counts, written last, tell that they are whole."""
    counts = plan.work / COUNTS
    if not counts.exists():
        save_json(counts, cut_corpus(plan.settings, plan.tokenizer, plan.evaluation, plan.work, out))
    return json.loads(counts.read_text(encoding="utf-8"))


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder under another name, unless it is there already."""
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    make(temporary)
    temporary.rename(folder)


def _embed(plan: IndexPlan, out: Path, encoder: Encoder | None, advance: Callable[[int], None]) -> None:
    if (out / "dense" / INDEX).exists():
        return
    encoder = encoder or load_encoder(plan.settings.dense)
    parts = encode_parts(counted(Chunks(out).texts(), advance), encoder, plan.work / "vectors")
    build_dense(parts, plan.settings.dense.index, out / "dense" / INDEX)


# ---------------------------------------------------------------------------------------------------------- open


def verify_index(plan: IndexPlan) -> dict[str, Any]:
    """The manifest of a whole index made from exactly this corpus with these settings; UserError names what differs."""
    if not plan.folder.exists():
        raise UserError(f"{plan.folder}: no index here; build it with scripts/build_index.py")
    try:
        manifest = verify_folder(plan.folder)
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    different = differences(manifest.get("inputs", {}), plan.inputs)
    different.sort(key=lambda difference: not difference.startswith("settings."))  # files may be many
    if different:
        more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        told = "; ".join(different[:SHOWN]) + more
        raise UserError(f"{plan.folder}: an index made from other files or settings ({told}); {REMEDY}")
    return manifest
